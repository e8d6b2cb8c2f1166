"""The app's page: one or two players continue a prompt, and every token shows its rewards.

Untrusted text (names, prompts, tokens, errors) is put into the page as text, by ``markupsafe``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import gradio
from markupsafe import Markup, escape
from starlette.middleware import Middleware

from avatarl.device import pick_device
from avatarl.errors import UserError
from avatarl.sanitise import one_line

from .continuation import Continuation, Side, open_all
from .door import Door
from .generate import Sampling
from .inspector import Inspector
from .pages import macros_of, read_source

MOST_NEW_TOKENS = 500
MOST_SESSIONS = 16  # of pages whose candidates are kept; the oldest are forgotten
PAGE = macros_of("play.html")
HINT = Markup('<p class="note">Choose a token to see its candidates.</p>')
# A click on a token is an event with its place, and marks it alone on the page; arrow keys move among tokens.
CHOOSE = """
element.addEventListener("click", (event) => {
  const token = event.target.closest("[data-place]");
  if (!token) return;
  for (const other of document.querySelectorAll(".generated [aria-pressed=true]")) other.ariaPressed = "false";
  token.ariaPressed = "true";
  trigger("click", {place: Number(token.dataset.place)});
});
element.addEventListener("keydown", (event) => {
  const way = {ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling"}[event.key];
  if (!way) return;
  event.preventDefault();
  event.target[way]?.focus();
});
"""
# The candidates may be below the window; how much of it they take is their style's.
SHOW = """
watch("value", () => element.querySelector("h2")?.scrollIntoView({block: "nearest", behavior: "smooth"}));
"""


def build(runs: Sequence[str], critics: Sequence[str] | None = None, device: str = "auto") -> gradio.Blocks:
    """The page; :func:`~avatarl.results.play.play` describes its arguments.

    Raises:
        UserError: A model cannot be opened.
    """
    if not 1 <= len(runs) <= 2:
        raise UserError(f"play is given {len(runs)} runs; expected one or two")
    sides, inspector, reason = open_all(runs, critics, pick_device(device))

    def html(value: Markup | str, **settings: Any) -> gradio.HTML:
        """A part of the page in the style of the other pages."""
        return gradio.HTML(value, apply_default_css=False, elem_classes="page", **settings)

    with gradio.Blocks(title="avatarl play", analytics_enabled=False) as app:
        html(PAGE.introduction(inspector, one_line(runs[0]), reason))
        prompt = gradio.Textbox(label="Prompt", placeholder="Empty: the beginning of a document", max_lines=8)
        with gradio.Row(equal_height=True):
            temperature = gradio.Slider(0, 2, value=0.8, step=0.1, label="Temperature", buttons=[])
            longest = min(MOST_NEW_TOKENS, max(side.player.context_length for side in sides) - 1)
            count = gradio.Slider(1, longest, value=min(60, longest), step=1, label="Tokens to generate", buttons=[])
            seed = gradio.Number(value=1, precision=0, minimum=0, label="Seed")
            button = gradio.Button("Generate", variant="primary", min_width=120)
        choices, texts, states = [], [], []
        with gradio.Row():
            for number, side in enumerate(sides):
                with gradio.Column(min_width=320):
                    label, place = f"Player of {one_line(side.run)}", f"choice-{number}"
                    choices.append(gradio.Dropdown(side.choices, label=label, filterable=False, elem_id=place))
                    texts.append(html("", js_on_load=CHOOSE, elem_id=f"generated-{number}"))
                    states.append(gradio.State())
        candidates = html("", js_on_load=SHOW, elem_id="candidates")

        inputs = [prompt, temperature, count, seed]
        # The models and the generator of random numbers serve one at a time.
        alone = {"concurrency_id": "models", "concurrency_limit": 1, "api_visibility": "private"}
        triggers, outputs = [button.click, prompt.submit], [*texts, *states, candidates]
        gradio.on(triggers, partial(generate_on_page, sides, inspector), [*inputs, *choices], outputs, **alone)
        for side, choice, text, state in zip(sides, choices, texts, states, strict=True):
            generate = partial(generate_on_page, [side], inspector)
            choice.input(generate, [*inputs, choice], [text, state, candidates], **alone)
            text.click(candidates_of_click, state, candidates, show_progress="hidden", api_visibility="private")
    return app


def generate_on_page(
    sides: Sequence[Side],
    inspector: Inspector | None,
    prompt: str,
    temperature: float,
    count: int,
    seed: int,
    *choices: str,
) -> list[Any]:
    """What the page shows of each side, what it keeps of each, and what it shows below.

    Raises:
        gradio.Error: What a user can mend, for the page to show.
    """
    try:
        sampling = Sampling(max_new_tokens=count, temperature=temperature, seed=seed)
        found = [
            side.generate(choice, prompt, sampling, inspector) for side, choice in zip(sides, choices, strict=True)
        ]
    except UserError as error:  # gradio takes the text for HTML
        raise gradio.Error(str(escape(error)), print_exception=False) from None
    return [*map(PAGE.generated, found), *found, HINT if inspector else ""]


def candidates_of_click(found: Continuation | None, event: gradio.EventData) -> str:
    """The candidates of the token that was clicked."""
    place = event._data["place"]
    if found is None or place not in range(len(found.positions)):  # of a page from before a restart
        return ""
    return PAGE.candidates(found, place)


def launch(app: gradio.Blocks, host: str, port: int) -> None:
    """Serve the page from other threads, with nothing from a network and nothing sent to one."""
    sans = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]
    mono = ["ui-monospace", "SF Mono", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
    colours = {
        "body_background_fill": "ground",
        "body_text_color": "ink",
        "block_background_fill": "ground",
        "block_border_color": "line",
        "block_label_text_color": "quiet",
        "block_title_text_color": "quiet",
        "input_background_fill": "raised",
        "slider_color": "accent",
        "button_primary_background_fill": "accent",
        "button_primary_background_fill_hover": "accent",
        "button_primary_text_color": "ground",
    }
    theme = gradio.themes.Base(font=sans, font_mono=mono).set(
        **{f"{name}{scheme}": f"var(--{colour})" for name, colour in colours.items() for scheme in ("", "_dark")}
    )
    # The rules of the other pages hold for our parts of this one.
    page = " ".join(map(read_source, ("page.css", "actions.css", "play.css")))
    # gradio asks the page whether it is there; a proxy would answer in its place.
    os.environ["no_proxy"] = ",".join([os.environ.get("no_proxy", os.environ.get("NO_PROXY", "")), host, "localhost"])
    app.launch(
        server_name=f"[{host}]" if ":" in host else host,  # as a URL has it
        server_port=port,
        theme=theme,
        head=f"<style>{read_source('colours.css')} .page {{ {page} }}</style>",
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        footer_links=[],
        app_kwargs={"middleware": [Middleware(Door, host=host)]},
        state_session_capacity=MOST_SESSIONS,
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
    )
