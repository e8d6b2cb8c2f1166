"""A report opened from disk: its charts hold Python's numbers, whatever its reader does, and obey no name."""

from __future__ import annotations

import csv
import io
import math
import time
from pathlib import Path

import pytest

from avatarl.results.charts import CHARTED, charts_of
from avatarl.results.report import report
from avatarl.results.runs import read_runs

from ..results.reports import EVALUATION, HOSTILE, line, made_up_lines, write_hostile_runs, write_run
from .conftest import WIDTHS, has_sideways_scrolling

pytestmark = pytest.mark.browser

GROUND_AND_LINE = ("layout.paper_bgcolor", "data[0].line.color")
ARE_DRAWN = '[...document.querySelectorAll(".plot")].every((plot) => plot.querySelector(".scatterlayer .trace path"))'


@pytest.fixture(scope="module")
def run_folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs; the last one's log is older than FLOPs, has no rewards, and a line that is no number."""
    folder = tmp_path_factory.mktemp("runs")
    old = [line("train", step, loss=2.0 + step, tokens_per_second=5.0) for step in range(1, 6)]
    old[2]["loss"] = math.nan
    lines = [made_up_lines(50), made_up_lines(50, offset=0.5), old]
    return [write_run(folder / name, each) for name, each in zip(("one", "two", "old"), lines, strict=True)]


@pytest.fixture(scope="module")
def page_file(run_folders: list[Path]) -> Path:
    out = run_folders[0].parent / "report.html"
    report(run_folders, out, evaluate=False, quiet=True)
    return out


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of hostile runs, evaluated and sampled by nobody."""
    folder = tmp_path_factory.mktemp("hostile")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("avatarl.results.report.evaluate_model", lambda *_, **__: EVALUATION)
        patch.setattr("avatarl.results.report.generate", lambda _, prompt, **__: [f"{prompt}</pre>{HOSTILE}"])
        report(write_hostile_runs(folder), folder / "report.html", prompts=[HOSTILE], quiet=True)
    return folder / "report.html"


def drawn_in(page, chart: str) -> list[dict]:
    """What Plotly holds of a chart."""
    script = "({x, y, visible, name}) => ({x: [...x], y: [...y], visible, name})"
    return page.evaluate(f"id => document.getElementById(id).data.map({script})", chart)


def wait_until(page, expression: str) -> None:
    """Wait for what is true soon; the page's own policy forbids Playwright's way of asking again."""
    deadline = time.monotonic() + 10
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(20)


def test_the_charts_hold_the_numbers_of_the_logs(run_folders: list[Path], page_file: Path, open_page):
    page = open_page(page_file)
    data = charts_of(read_runs(run_folders, CHARTED))
    assert page.locator(".plot").count() == len(data.charts) == 9
    for axis in ("tokens", "flops"):
        page.check(f"input[name=axis][value={axis}]")
        for chart in data.charts:
            drawn = drawn_in(page, chart["id"])
            assert [trace["y"] for trace in drawn] == [series["y"] for series in chart["series"]]
            places = [data.axes[chart["event"]][series["run"]][axis] for series in chart["series"]]
            assert [trace["x"] for trace in drawn] == [each or [] for each in places]
    (loss,) = [chart for chart in data.charts if chart["id"] == "train-loss"]
    assert loss["series"][2]["y"] == [3.0, 4.0, None, 6.0, 7.0]


def test_a_run_that_is_not_chosen_is_hidden_everywhere(page_file: Path, open_page):
    page = open_page(page_file)
    page.get_by_label("two").uncheck()
    for chart in page.eval_on_selector_all(".plot", "plots => plots.map(plot => plot.id)"):
        assert {trace["name"]: trace["visible"] for trace in drawn_in(page, chart)}.items() <= {
            ("one", True),
            ("two", False),
            ("old", True),
        }
    page.get_by_label("two").check()
    assert drawn_in(page, "train-loss")[1]["visible"]


def test_arrow_keys_read_point_after_point(page_file: Path, open_page):
    page = open_page(page_file)
    plot, readout = page.locator("#eval-cross_entropy"), page.locator("#eval-cross_entropy + .readout")
    first, second = drawn_in(page, "eval-cross_entropy")
    plot.focus()
    for key, place in (("ArrowRight", 0), ("ArrowRight", 1), ("ArrowLeft", 0), ("ArrowLeft", 0)):
        plot.press(key)
        expected = f"{first['x'][place]:,} training tokens: one {first['y'][place]:g}, two {second['y'][place]:g}"
        assert readout.text_content() == expected
        assert page.locator("#eval-cross_entropy .hoverlayer").text_content()
    plot.press("Escape")
    assert readout.text_content() == ""
    page.get_by_label("two").uncheck()
    plot.press("ArrowLeft")
    assert readout.text_content() == f"{first['x'][-1]:,} training tokens: one {first['y'][-1]:g}"
    page.get_by_label("one").uncheck()
    for _ in range(3):  # the third line is a gap
        page.locator("#train-loss").press("ArrowRight")
    assert page.locator("#train-loss + .readout").text_content() == "8,192 training tokens: old 6"


def test_every_control_is_reached_by_the_keyboard(page_file: Path, open_page):
    page = open_page(page_file)
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.name"))
    wanted = "[...document.querySelectorAll('.plot, .save, .scroll')].filter(e => e.checkVisibility())"
    labels = set(page.evaluate(f"{wanted}.map(e => e.getAttribute('aria-label'))"))
    assert labels | {"run", "axis"} <= reached and len(labels) == 2 * 9 + 3
    assert page.locator(".settings tbody tr:visible").count() == 0  # three runs of the same settings
    page.get_by_label("only what differs").uncheck()
    assert page.locator(".settings tbody tr:visible").count() == 6


def test_saved_data_are_what_is_drawn(run_folders: list[Path], page_file: Path, open_page):
    page = open_page(page_file)
    page.get_by_label("two").uncheck()
    page.check("input[name=axis][value=flops]")
    with page.expect_download() as download:
        page.click("button[data-chart=train-grad_norm]")
    assert download.value.suggested_filename == "train-grad_norm.csv"
    header, *rows = csv.reader(io.StringIO(Path(download.value.path()).read_text(encoding="utf-8")))
    first = drawn_in(page, "train-grad_norm")[0]
    assert header == ["run", "flops", "grad_norm"]
    assert [(name, float(x), float(y)) for name, x, y in rows] == [
        ("one", x, y) for x, y in zip(first["x"], first["y"], strict=True)
    ]


def test_hostile_words_are_inert(hostile_page: Path, open_page):
    page = open_page(hostile_page)
    page.locator("#train-loss").hover()
    page.locator("#reliability").focus()
    page.locator("#reliability").press("ArrowRight")
    label = page.locator("#reliability .hoverlayer").text_content()
    assert "<b><img src=x" in label and page.locator("#reliability .hoverlayer a, .plot img").count() == 0
    assert page.locator("img, iframe, script:not([type])").count() == 2  # plotly's and the report's scripts
    assert page.locator(".sample pre").first.text_content().count("<script>alert(1)</script>") == 2
    with page.expect_download() as download:
        page.click("button[data-chart=reliability]")
    _, *rows = csv.reader(io.StringIO(Path(download.value.path()).read_text(encoding="utf-8")))
    assert {row[0][:5] for row in rows} == {"<b><i", "'=cmd"}
    assert rows[0][1:] == ["0.25", "0.5", "7"]
    assert page.evaluate("window.hacked") is None
    *runs, diagonal = drawn_in(page, "reliability")
    assert [(run["x"], run["y"]) for run in runs] == [([0.25, 0.75], [0.5, 0.5])] * 2
    assert diagonal["x"] == diagonal["y"] == [0, 1]
    assert drawn_in(page, "top16_reliability")[0]["y"] == [0.5]  # where nothing came true there is no logarithm


@pytest.mark.parametrize("which", ["page_file", "hostile_page"])
def test_no_page_is_wider_than_its_window(which: str, open_page, request):
    phone, desk = WIDTHS
    page = open_page(request.getfixturevalue(which), width=phone)
    tops = "[...document.querySelectorAll('#curves-heading ~ .charts .plot')].map(p => p.getBoundingClientRect().top)"
    assert not has_sideways_scrolling(page)
    assert len(set(page.evaluate(tops))) == 9  # one below the other
    page.set_viewport_size({"width": desk, "height": 900})
    fits = "Math.abs(p._fullLayout.width - p.clientWidth) < 2"
    wait_until(page, f"[...document.querySelectorAll('.plot')].every(p => {fits})")
    assert not has_sideways_scrolling(page)
    assert len(set(page.evaluate(tops))) == 3


def test_charts_follow_the_colour_scheme(page_file: Path, open_page):
    page = open_page(page_file)
    ground, line_colour = (f"document.getElementById('train-loss').{name}" for name in GROUND_AND_LINE)
    assert (page.evaluate(ground), page.evaluate(line_colour)) == ("#ffffff", "#0072b2")
    page.emulate_media(color_scheme="dark")
    wait_until(page, f"{ground} === '#14171a'")
    assert page.evaluate(line_colour) == "#56b4e9"


def test_long_runs_are_drawn_at_once(tmp_path: Path, open_page):
    """Four runs of 10,000 lines; some 1.4 s on two Xeon cores, unless others are busy on them."""
    lines = made_up_lines(10_000)
    runs = [write_run(tmp_path / f"run-{number}", lines) for number in range(4)]
    report(runs, tmp_path / "report.html", evaluate=False, quiet=True)

    def seconds_to_open() -> float:
        started = time.monotonic()
        page = open_page(tmp_path / "report.html")
        wait_until(page, ARE_DRAWN)
        assert page.locator(".plot").count() == 9
        return time.monotonic() - started

    assert any(seconds_to_open() < 4 for _ in range(3))
