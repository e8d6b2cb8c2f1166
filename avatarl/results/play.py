"""A page served on this machine: one or two players continue a prompt, and every token shows what it was paid.

What comes from outside (names, prompts, tokens, errors) is put into the page as text, by ``markupsafe``.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from markupsafe import Markup, escape
from transformers import PreTrainedTokenizerBase

from avatarl.device import pick_device
from avatarl.errors import UserError
from avatarl.models import Critic, check_same_vocabulary, open_critic
from avatarl.objective import AvataRLConfig
from avatarl.objective.config import require_whole
from avatarl.sanitise import one_line

from .checkpoints import model_of, players_of
from .generate import Sampling, continue_ids, prompt_ids
from .inspector import Inspector, Position, settings_and_critics, shown_token
from .pages import macros_of, read_source
from .players import Player, open_player

try:
    import gradio
    from starlette.middleware import Middleware

    from .door import Door
except ImportError:
    gradio = None

LARGEST_PORT = 65535
MOST_NEW_TOKENS = 500
MOST_SESSIONS = 16  # of pages whose candidates are kept; the oldest are forgotten
CONTEXT_CHARACTERS = 120  # shown before a chosen token
PAGE = macros_of("play.html")
HINT = Markup('<p class="note">Choose a token to see its candidates.</p>')
# A click on a token is an event with its place, and marks it alone on the page; arrow keys move among tokens.
CHOOSE = """
element.addEventListener("click", (event) => {
  const token = event.target.closest("[data-place]");
  if (!token) return;
  for (const other of document.querySelectorAll(".said [aria-pressed=true]")) other.ariaPressed = "false";
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
watch("value", () => element.querySelector("h2")?.scrollIntoView({block_size: "nearest", behavior: "smooth"}));
"""


@dataclass(frozen=True)
class Judges:
    """The critics of a page and the settings under which they judge."""

    critics: list[Critic]
    names: list[str]
    config: AvataRLConfig
    tokenizer: PreTrainedTokenizerBase

    def inspector(self, player: Player) -> Inspector:
        """A player before these critics.

        Raises:
            UserError: The player reads other tokens than the critics, or the settings do not fit them.
        """
        check_same_vocabulary(self.tokenizer, player.tokenizer, player.name, role="player")
        return Inspector(player.model, self.critics, player.tokenizer, self.config, [player.name, *self.names])


@dataclass(frozen=True)
class Said:
    """A prompt and how a player went on."""

    player: str
    prompt: str
    texts: list[str]  # of the generated tokens, white space visible
    positions: Sequence[Position]  # of these tokens; none without judges

    def before(self, place: int) -> str:
        """The end of what stands before a generated token."""
        return (self.prompt + "".join(self.texts[:place]).replace("␣", " "))[-CONTEXT_CHARACTERS:]


class Side:
    """A run on the page. One of its players is open at a time, the one that was last asked for."""

    def __init__(self, run: str, device: torch.device):
        """
        Raises:
            UserError: It has no player, or its first cannot be opened.
        """
        self.run, self.device, self.choices = run, device, list(players_of(run))
        self.choice = self.choices[0]
        self.player = self._opened(self.choice)

    def say(self, choice: str, prompt: str, sampling: Sampling, judges: Judges | None) -> Said:
        """Let one of the run's players continue a prompt.

        Raises:
            UserError: The player cannot be opened, or the prompt is too long for it.
        """
        if choice != self.choice:
            self.player, self.choice = self._opened(choice), choice
        tokenizer = self.player.tokenizer
        read = prompt_ids(tokenizer, prompt)
        (ids,) = continue_ids(self.player, read, sampling)
        generated = ids[len(read) :]
        positions = judges.inspector(self.player).inspect_ids(ids).positions[-len(generated) :] if judges else ()
        return Said(self.player.name, prompt, [shown_token(tokenizer, token) for token in generated], positions)

    def _opened(self, choice: str) -> Player:
        with TemporaryDirectory() as scratch:
            return open_player(model_of(self.run, choice, Path(scratch)), self.device, f"{self.run}, {choice}")


def open_judges(side: Side, critics: Sequence[str] | None) -> Judges:
    """The critics that are named, else those that the side's run was trained with; under its settings either way.

    Raises:
        UserError: There is none, or one cannot be opened.
    """
    config, names = settings_and_critics(side.run, critics)
    opened = [open_critic(name, side.player.tokenizer, device=side.device) for name in names]
    return Judges(opened, names, config, side.player.tokenizer)


# --- the page -------------------------------------------------------------------------------------------------------


def build_app(runs: Sequence[str], critics: Sequence[str] | None = None, device: str = "auto") -> gradio.Blocks:
    """The page, not yet served.

    Args:
        runs: One or two of them: run folders, model folders or hub ids.
        critics: Those that judge; None for those that the first run was trained with, as far as they are there.
        device: ``cpu``, ``cuda`` or ``auto``.

    Raises:
        UserError: gradio is not installed, or a model cannot be opened.
    """
    if gradio is None:
        raise UserError("play needs gradio, which is not installed; pip install 'avatarl[app]'")
    if not 1 <= len(runs) <= 2:
        raise UserError(f"play is given {len(runs)} runs; expected one or two")
    chosen = pick_device(device)
    sides = [Side(run, chosen) for run in runs]
    judges, reason = None, ""
    try:
        judges = open_judges(sides[0], critics)
        for side in sides:
            judges.inspector(side.player)
    except UserError as error:
        if critics is not None:
            raise
        judges, reason = None, str(error)

    with gradio.Blocks(title="avatarl play", analytics_enabled=False) as app:
        _html(PAGE.introduction(judges, one_line(runs[0]), reason))
        prompt = gradio.Textbox(label="Prompt", placeholder="Empty: the beginning of a document", max_lines=8)
        with gradio.Row(equal_height=True):
            temperature = gradio.Slider(0, 2, value=0.8, step=0.1, label="Temperature", buttons=[])
            longest = min(MOST_NEW_TOKENS, max(side.player.context_length for side in sides) - 1)
            count = gradio.Slider(1, longest, value=min(60, longest), step=1, label="Tokens to generate", buttons=[])
            seed = gradio.Number(value=1, precision=0, minimum=0, label="Seed")
            button = gradio.Button("Generate", variant="primary", min_width=120)
        choices, texts, saids = [], [], []
        with gradio.Row():
            for number, side in enumerate(sides):
                with gradio.Column(min_width=320):
                    label = f"Player of {one_line(side.run)}"
                    choices.append(
                        gradio.Dropdown(side.choices, label=label, filterable=False, elem_id=f"choice-{number}")
                    )
                    texts.append(_html("", js_on_load=CHOOSE, elem_id=f"said-{number}"))
                    saids.append(gradio.State())
        candidates = _html("", js_on_load=SHOW, elem_id="candidates")

        asked = [prompt, temperature, count, seed]
        # The models and the generator of random numbers serve one at a time.
        alone = {"concurrency_id": "models", "concurrency_limit": 1, "api_visibility": "private"}
        triggers, outputs = [button.click, prompt.submit], [*texts, *saids, candidates]
        gradio.on(triggers, partial(say, sides, judges), [*asked, *choices], outputs, **alone)
        for side, choice, text, said in zip(sides, choices, texts, saids, strict=True):
            choice.input(partial(say, [side], judges), [*asked, choice], [text, said, candidates], **alone)
            text.click(candidates_of_click, said, candidates, show_progress="hidden", api_visibility="private")
    return app


def _html(value: Markup | str, **settings: Any) -> gradio.HTML:
    """A part of the page in the style of the other pages."""
    return gradio.HTML(value, apply_default_css=False, elem_classes="page", **settings)


def say(
    sides: Sequence[Side],
    judges: Judges | None,
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
        saids = [side.say(choice, prompt, sampling, judges) for side, choice in zip(sides, choices, strict=True)]
    except UserError as error:  # gradio takes the text for HTML
        raise gradio.Error(str(escape(error)), print_exception=False) from None
    return [*map(PAGE.said, saids), *saids, HINT if judges else ""]


def candidates_of_click(said: Said | None, event: gradio.EventData) -> str:
    """The candidates of the token that was clicked."""
    place = event._data["place"]
    if said is None or place not in range(len(said.positions)):  # of a page from before a restart
        return ""
    return PAGE.candidates(said, place)


# --- serving --------------------------------------------------------------------------------------------------------


def play(
    runs: Sequence[str],
    critics: Sequence[str] | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    device: str = "auto",
) -> None:
    """Serve the page until an interrupt.

    Args:
        runs, critics, device: As :func:`build_app` has them.
        host: The address to listen on. Whoever reaches it may use the page: there is no password.
        port: The port there.

    Raises:
        UserError: gradio is not installed, the port cannot be had, or a model cannot be opened.
    """
    check_port(host, port)
    app = build_app(runs, critics, device)
    launch(app, host, port)
    print(f"{app.local_url} (Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    finally:
        app.close(verbose=False)


def check_port(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on, before models are opened for it.

    Raises:
        UserError: naming it.
    """
    require_whole("port", port, minimum=1)
    if port > LARGEST_PORT:
        raise UserError(f"port is {port}; expected at most {LARGEST_PORT}")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"port {port} of {host} cannot be listened on ({error}); give a free one with --port, or another --host"
        ) from error


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
