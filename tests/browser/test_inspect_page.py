"""The page of an inspected text, opened from disk: its numbers are Python's, whatever its reader changes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from avatarl import AvataRLConfig
from avatarl.results.inspector import Inspection, Inspector
from avatarl.results.payouts import write_inspection

from .conftest import SCHEMES, WIDTHS, has_sideways_scrolling

pytestmark = pytest.mark.browser

TEXT = "quick fox old oak\nblue sea, wise owl </script><script>alert(1)</script> <img src=x onerror=alert(2)>"
HOSTILE = "</script><img src=x onerror=alert(3)>\u202e"
CONFIG = AvataRLConfig.article(top_k=4)
COLUMNS = ("reality", "consensus", "reward", "policy", "push")


@pytest.fixture(scope="module")
def opened(player_folder: Path, critic_folder: Path) -> Inspector:
    """A player and a critic under hostile names."""
    inspector = Inspector.open(player_folder, [str(critic_folder)], CONFIG, device="cpu")
    inspector.names = (HOSTILE, HOSTILE)
    return inspector


@pytest.fixture(scope="module")
def inspection(opened: Inspector) -> Inspection:
    return opened.inspect(TEXT)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory, inspection: Inspection) -> Path:
    out = tmp_path_factory.mktemp("out") / "inspection.html"
    write_inspection(inspection, out)
    return out


def rows_of(page) -> dict[int, dict[str, float]]:
    """The table of actions as the page shows it, by token."""
    script = """rows => rows.map(row => [Number(row.dataset.token), Object.fromEntries(
        [...row.querySelectorAll("td[data-value]")].map(cell => [cell.className, Number(cell.dataset.value)]))])"""
    return dict(page.eval_on_selector_all("#actions tbody tr", script))


def summary_of(page) -> dict[str, float]:
    script = """rows => rows.map(row => [row.dataset.name, Number(row.querySelector("td").dataset.value)])"""
    return dict(page.eval_on_selector_all("#summary tbody tr", script))


def assert_shows(page, inspection: Inspection, number: int) -> None:
    """The page's table of a position, and its means, are those of an inspection."""
    shown = rows_of(page)
    actions = inspection.positions[number].actions
    assert shown.keys() == {action.token for action in actions}
    for action in actions:
        expected = {name: getattr(action, name) for name in COLUMNS[:-1]} | {"push": -action.gradient}
        expected["critic"] = action.critic[0]
        assert shown[action.token] == pytest.approx(expected, rel=1e-6, abs=1e-8)
    means = {name: value for name, value in inspection.summary.items() if name != "loss"}
    assert summary_of(page) == pytest.approx(means, rel=1e-6, abs=1e-8)


def change(page, **settings: str) -> None:
    for name, value in settings.items():
        control = page.locator(f"#setting-{name}")
        if control.evaluate("element => element.tagName") == "SELECT":
            control.select_option(value)
        else:
            control.fill(value)


def test_it_opens_with_pythons_numbers(open_page, page_file, inspection):
    page = open_page(page_file)
    assert page.locator("#cells button").count() == len(inspection.positions)
    worst = inspection.disagreements(1)[0]
    assert_shows(page, inspection, worst)  # which is chosen at first
    for number in (0, 3, len(inspection.positions) - 1):
        page.locator(f'#cells [data-number="{number}"]').click()
        assert_shows(page, inspection, number)
        assert (
            page.locator("#position-heading").inner_text() == f"Position {number}: {inspection.positions[number].text}"
        )


@pytest.mark.parametrize(
    "changes",
    [
        dict(top_k="9"),
        dict(top_k="2", smoothing="0.35", threshold="none", reward_cap=""),
        dict(reality_weight="0.2", critic_weight="0.8", threshold="mass"),
        dict(pool="arithmetic", tail="dense", threshold="none", entropy_coef="0.4"),
        dict(tail="target", reward_cap="0.7", reward_scale="3"),
        dict(top_p="0.5"),
    ],
    ids=str,
)
def test_changed_settings_give_pythons_numbers_at_once(open_page, page_file, opened, changes):
    page = open_page(page_file)
    page.locator('#cells [data-number="2"]').click()
    before = rows_of(page)
    change(page, **changes)
    assert page.locator("#refused").inner_text() == ""
    as_python = {
        name: None if value == "" else value if value.isalpha() else int(value) if name == "top_k" else float(value)
        for name, value in changes.items()
    }
    config = dataclasses.replace(CONFIG, **as_python)
    changed = Inspector(opened.player, opened.critics, opened.tokenizer, config, opened.names).inspect(TEXT)
    assert_shows(page, changed, 2)
    page.locator("#reset").click()
    assert rows_of(page) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(top_k="0"), "expected a whole number at least 1"),
        (dict(top_k="2.5"), "expected a whole number"),
        (dict(smoothing="1"), "expected a number at least 0 and below 1"),
        (dict(critic_weight="0", reality_weight="0"), "At least one expert needs a weight"),
        (dict(reality_weight="0.5", pool="arithmetic"), "weights that sum to 1; they sum to 0.8"),
        (dict(tail="dense"), "needs an arithmetic pool and no threshold"),
        (dict(threshold="mass", tail="target"), "is that of a geometric pool"),
    ],
    ids=str,
)
def test_what_python_would_refuse_is_refused(open_page, page_file, changes, message):
    page = open_page(page_file)
    change(page, **{name: value for name, value in changes.items() if name != list(changes)[-1]})
    before = rows_of(page)
    last = list(changes)[-1]
    change(page, **{last: changes[last]})
    assert message in page.locator("#refused").inner_text()
    assert rows_of(page) == before
    change(page, **{last: {"pool": "geometric", "tail": "renormalise"}.get(last, "0.3" if last != "top_k" else "3")})
    assert page.locator("#refused").inner_text() == ""


def test_the_keyboard_is_enough(open_page, page_file, inspection):
    page = open_page(page_file)
    page.locator('#cells [data-number="0"]').click()
    for key, number in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("ArrowDown", 11), ("ArrowUp", 1)):
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.dataset.number") == str(number)
        assert page.locator("#position-heading").inner_text().startswith(f"Position {number}:")
    page.keyboard.press("End")
    assert_shows(page, inspection, len(inspection.positions) - 1)
    assert page.locator('#cells button[tabindex="0"]').count() == 1
    page.keyboard.press("Home")
    page.evaluate("document.getElementById('setting-top_k').focus()")
    page.keyboard.press("ArrowUp")
    assert page.locator("#setting-top_k").input_value() == "5"
    assert page.locator("#position-heading").inner_text().startswith("Position 0:")


def test_text_and_names_from_outside_are_text(open_page, page_file, inspection):
    page = open_page(page_file)
    shown = page.locator("#cells").evaluate("element => element.textContent")
    lines = page.locator("#cells").inner_text().split("\n")
    assert [lines[0].strip(), lines[1][:8]] == ["quick fox old oak⏎", "blue sea"]
    assert shown == TEXT.replace("\n", "⏎")
    assert page.locator("h1 + p code").first.inner_text() == HOSTILE.replace("\u202e", "\\u202e")
    assert page.locator("main img").count() == 0
    script = page.evaluate("[...document.scripts].filter(script => script.type !== 'application/json').length")
    assert script == 2  # ours
    # The page's own policy refuses a script that is put in later.
    assert page.evaluate("document.querySelector('meta[http-equiv]').content").startswith("default-src 'none'")


def test_a_hostile_token_is_text_wherever_it_stands(open_page, inspection, tmp_path):
    """A tokenizer may hold any text as one token."""
    token = "<img src=x onerror=alert(4)><b>"
    hostile = dataclasses.replace(inspection, texts=dict.fromkeys(inspection.texts, token))
    write_inspection(hostile, tmp_path / "page.html")
    page = open_page(tmp_path / "page.html")
    assert page.locator("main img").count() == page.locator("#cells b").count() == 0
    assert page.locator("#cells button").first.inner_text() == token
    assert page.locator("#actions td").first.inner_text() == token


def test_a_place_of_disagreement_leads_there(open_page, page_file, inspection):
    page = open_page(page_file)
    places = inspection.disagreements(5)
    buttons = page.locator("#disagreements button")
    assert [int(text.split(":")[0]) for text in buttons.all_inner_texts()] == places
    buttons.nth(3).click()
    assert_shows(page, inspection, places[3])


def test_the_colour_is_what_was_earned(open_page, page_file, inspection):
    page = open_page(page_file)
    of = "cells => cells.map(cell => Number(cell.style.getPropertyValue('--share')))"
    found = page.eval_on_selector_all("#cells button", of)
    shares = [position.expected_reward_share for position in inspection.positions]
    assert found == pytest.approx([0.65 * share**0.5 for share in shares], abs=1e-6)
    page.locator("#colouring").select_option("other_reward_share")
    others = [position.other_reward_share for position in inspection.positions]
    found = page.eval_on_selector_all("#cells button", of)
    assert found == pytest.approx([0.65 * share**0.5 for share in others], abs=1e-4)


def test_what_is_shown_can_be_saved(open_page, page_file, inspection):
    page = open_page(page_file)
    change(page, top_k="3")
    with page.expect_download() as download:
        page.locator("#save").click()
    saved = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    assert saved["settings"]["top_k"] == 3 and saved["player"] == HOSTILE
    assert [position["text"] for position in saved["positions"]] == [p.text for p in inspection.positions]
    assert saved["summary"] == pytest.approx(summary_of(page))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_fits_a_phone_and_a_desk_in_both_schemes(open_page, page_file, width: int, scheme: str):
    page = open_page(page_file, width=width, scheme=scheme)
    assert not has_sideways_scrolling(page)
    lightness = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (min(lightness) > 200) == (scheme == "light")
    table, cells = page.locator("#actions").bounding_box(), page.locator("#cells").bounding_box()
    is_beside = table["x"] > cells["x"] + cells["width"]
    assert is_beside == (width == 1400)
