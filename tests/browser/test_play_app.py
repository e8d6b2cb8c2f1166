"""`avatarl play` as a person meets it: the command in a process of its own, its page in a browser, no network."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from avatarl.results.checkpoints import model_of
from avatarl.results.generate import Sampling, continue_ids, prompt_ids
from avatarl.results.inspect import trained_with
from avatarl.results.inspector import Inspection, Inspector
from avatarl.results.players import open_player
from avatarl.training import OptimConfig, train

from .conftest import SCHEMES, WIDTHS, has_sideways_scrolling

pytestmark = pytest.mark.browser
pytest.importorskip("gradio", reason="gradio is not installed (extra app)")

PROMPT, TEMPERATURE, COUNT, SEED = "quick fox", 1.5, 12, 3
HOSTILE = "<img src=x onerror=alert(1)>{{7*7}}${7*7}"
# The command, with each place that the process connects to or looks up written down. What is started in the background
# of a shell is deaf to an interrupt.
COMMAND = """
import signal, sys

def note(event, arguments):
    if event == "socket.getaddrinfo" or event == "socket.connect" and isinstance(arguments[1], tuple):
        with open({log!r}, "a") as file:
            print(arguments[0] if event == "socket.getaddrinfo" else arguments[1][0], file=file)

sys.addaudithook(note)
signal.signal(signal.SIGINT, signal.default_int_handler)
from avatarl.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_config) -> list[Path]:
    """A player and its twin, the first under a hostile name."""
    fast = dict(optim=OptimConfig(learning_rate=0.03, warmup_steps=1), eval_every_steps=8)
    folders = [tmp_path_factory.mktemp("runs") / name for name in (HOSTILE, "twin")]
    for folder, objective in zip(folders, ("avatarl", "cross_entropy"), strict=True):
        train(tiny_config(folder.parent, out=str(folder), objective=objective, **fast), quiet=True)
    return folders


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, runs) -> Iterator[str]:
    """The address of the page; in the end the command is interrupted, and has spoken with nobody but itself."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder, log = tmp_path_factory.mktemp("here"), tmp_path_factory.mktemp("log") / "asked.txt"
    command = [sys.executable, "-c", COMMAND.format(log=str(log)), "play", *map(str, runs), "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--device", "cpu"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == f"http://127.0.0.1:{port}/ (Ctrl-C ends it)\n"
        yield f"http://127.0.0.1:{port}/"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (130, "", "avatarl: interrupted\n")
    assert set(log.read_text().split()) == {"127.0.0.1"}
    assert list(folder.iterdir()) == []


@pytest.fixture
def open_app(browser, server: str) -> Iterator[Callable]:
    """``open_app(scheme=…)``; in the end nobody else was asked, and the console has shown no error."""
    contexts, troubles = [], []

    def open_at(scheme: str = "light"):
        context = browser.new_context(viewport={"width": 1400, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: message.type in ("error", "warning") and troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: (troubles.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: request.url.startswith((server, "data:")) or troubles.append(request.url))
        page.goto(server)
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert troubles == []


def generate_in(page, prompt: str = PROMPT) -> None:
    """Fill in the form, and press Enter."""
    for label, value in {
        "Temperature": TEMPERATURE,
        "Tokens to generate": COUNT,
        "Seed": SEED,
        "Prompt": prompt,
    }.items():
        page.get_by_label(label).first.fill(str(value))
    page.get_by_label("Prompt").press("Enter")


def wait_for_tokens(page, side: int, texts: list[str] | None = None) -> list[str]:
    """What a side shows of each generated token, once it is there, or once it is ``texts``."""
    script = """([side, wanted]) => {
        const tokens = [...document.querySelectorAll(`#generated-${side} button`)].map(token => token.title);
        const texts = tokens.map(title => title.replace(/: [0-9.]+ % of the best reward$/, ""));
        return texts.length && (!wanted || JSON.stringify(texts) === JSON.stringify(wanted)) && texts;
    }"""
    return page.wait_for_function(script, arg=[side, texts], timeout=10_000).json_value()


def expected(
    run: Path, player: str, scratch: Path, judged_as: Path, seed: int = SEED
) -> tuple[list[str], Inspection, int]:
    """What the page should show of each token; the inspector's own view, and where they begin in it."""
    model = model_of(run, player, scratch)
    opened = open_player(model, "cpu")
    read = prompt_ids(opened.tokenizer, PROMPT)
    sampling = Sampling(max_new_tokens=COUNT, temperature=TEMPERATURE, seed=seed)
    (ids,) = continue_ids(opened, read, sampling)
    config, critics = trained_with(judged_as)
    inspection, first = Inspector.open(model, critics, config, "cpu").inspect_ids(ids), len(read) - 1
    return [position.text for position in inspection.positions[first:]], inspection, first


def assert_shows(page, run: Path, inspection: Inspection, number: int, place: int) -> None:
    """The table is that of a position."""
    page.locator("#candidates h2", has_text=f"Position {place} of {run}").wait_for()
    script = """rows => rows.map(row => [Number(row.dataset.token), Object.fromEntries(
        [...row.querySelectorAll("td[data-value]")].map(cell => [cell.className, Number(cell.dataset.value)]))])"""
    shown = dict(page.eval_on_selector_all("#candidates tbody tr", script))
    actions = inspection.positions[number].actions
    assert shown.keys() == {action.token for action in actions}
    for action in actions:
        names = ("reality", "consensus", "reward", "policy")
        numbers = {name: getattr(action, name) for name in names} | {"push": -action.gradient}
        assert shown[action.token] == pytest.approx({**numbers, "critic": action.critic[0]}, rel=1e-4, abs=1e-7)


def test_two_players_speak_and_every_token_can_be_looked_at(open_app, runs, tmp_path):
    page = open_app()
    generate_in(page)
    for side, (run, place) in enumerate(zip(runs, (2, 4), strict=True)):
        texts, inspection, first = expected(run, "best", tmp_path, judged_as=runs[0])
        assert wait_for_tokens(page, side) == texts
        page.locator(f"#generated-{side} button").nth(place).click()
        assert_shows(page, run, inspection, first + place, place)
        assert page.locator('.generated [aria-pressed="true"]').count() == 1
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    assert_shows(page, runs[1], inspection, first + 3, 3)


@pytest.mark.parametrize("side", [0, 1])
def test_another_checkpoint_says_something_else(open_app, runs, tmp_path, side: int):
    page = open_app()
    generate_in(page)
    before = [wait_for_tokens(page, side) for side in (0, 1)]
    page.locator(f"#generated-{side} button").first.click()
    page.locator("#candidates table").wait_for()
    page.locator(f"#choice-{side} input").click()
    options = page.get_by_role("option")
    assert [option.split()[-1] for option in options.all_inner_texts()] == ["best", "final", "4", "8"]
    options.filter(has_text="step 4").click()
    page.locator("#candidates", has_text="Choose a token").wait_for()
    texts, inspection, first = expected(runs[side], "step 4", tmp_path, judged_as=runs[0])
    assert wait_for_tokens(page, side) == texts != before[side]
    assert wait_for_tokens(page, 1 - side) == before[1 - side]
    page.locator(f"#generated-{side} button").nth(1).click()
    assert_shows(page, runs[side], inspection, first + 1, 1)


def test_the_button_takes_the_form_as_it_is(open_app, runs, tmp_path):
    page = open_app()
    generate_in(page)
    before = wait_for_tokens(page, 0)
    page.get_by_label("Seed").fill("8")
    page.get_by_role("button", name="Generate", exact=True).click()
    texts, _, _ = expected(runs[0], "best", tmp_path, judged_as=runs[0], seed=8)
    assert wait_for_tokens(page, 0, texts) != before


def test_a_prompt_that_is_too_long_is_said_in_a_line(open_app):
    page = open_app()
    generate_in(page, "old oak " * 40)
    message = page.get_by_test_id("toast-body").inner_text()
    assert re.search(r"prompt has \d+ tokens; expected fewer than the model's context of 16", message)
    assert "Traceback" not in page.content()
    generate_in(page)
    wait_for_tokens(page, 0)


def test_names_and_prompts_are_text(open_app):
    page = open_app()
    generate_in(page, "<b>")
    wait_for_tokens(page, 0)
    page.locator("#generated-0 button").first.click()
    page.locator("#candidates table").wait_for()
    assert page.locator(".generated .prompt").first.inner_text() == "<b>"
    assert page.locator("img[src=x], .generated b, h1 + p b").count() == 0
    for place in ("h1 + p", "#candidates h2", "#choice-0"):
        assert HOSTILE in page.locator(place).first.inner_text()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_fits_a_phone_and_a_desk_in_both_schemes(open_app, scheme: str):
    page = open_app(scheme=scheme)
    generate_in(page, "quick fox blue sea long road")
    wait_for_tokens(page, 1)
    page.locator("#generated-0 button").first.click()
    page.locator("#candidates table").wait_for()
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        assert not has_sideways_scrolling(page)
        assert page.eval_on_selector_all(".generated", "all => all.every(said => said.scrollWidth <= said.clientWidth)")
        first, second = (page.locator(f"#generated-{side}").bounding_box() for side in (0, 1))
        assert (second["x"] > first["x"] + first["width"]) == (width == 1400)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (min(ground) > 200) == (scheme == "light")
    for place in (
        "h1",
        "h1 + p",
        ".generated .prompt",
        ".generated button",
        "#candidates td",
        "#candidates .note",
        "label span",
    ):
        assert contrast_of(page, place) > 4.5, place


def contrast_of(page, place: str) -> float:
    """The contrast of a text with what is behind it, as WCAG defines it; 21 is black on white."""
    ink, grounds = page.locator(place).first.evaluate(
        """element => {
            const grounds = [];
            for (let at = element; at; at = at.parentElement) grounds.push(getComputedStyle(at).backgroundColor);
            return [getComputedStyle(element).color, grounds];
        }"""
    )
    colours = [[float(number) for number in re.findall(r"[\d.]+", colour)] for colour in (*reversed(grounds), ink)]
    behind = shown = [0.0, 0.0, 0.0]
    for red, green, blue, *alpha in colours:
        opacity, behind = (alpha or [1.0])[0], shown
        shown = [opacity * new + (1 - opacity) * old for new, old in zip((red, green, blue), behind, strict=True)]
    low, high = sorted(map(luminance, (behind, shown)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: list[float]) -> float:
    """Relative luminance of an sRGB colour in 0 to 255."""
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in (c / 255 for c in colour)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_nobody_else_can_reach_it(server: str):
    port = int(server.rstrip("/").rpartition(":")[2])
    listening = []
    for path in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(path).read_text().splitlines()[1:]:
            _, local, _, state = line.split()[:4]
            if state == "0A" and int(local.rpartition(":")[2], 16) == port:
                listening.append(local.rpartition(":")[0])
    assert listening == ["0100007F"]
