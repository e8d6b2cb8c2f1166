"""A comparison's page opened from disk: its chart holds the means of curves.csv, whatever its reader does."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from avatarl.comparison.report import write_reports

from ..comparison.rows import curve, result, write_comparison
from ..results.reports import write_run
from .conftest import SCHEMES, WIDTHS, has_sideways_scrolling
from .test_report_page import ARE_DRAWN, drawn_in, wait_until

pytestmark = pytest.mark.browser

AXES = ("tokens", "flops", "all_flops", "seconds")
ARMS = ("cross_entropy", "article", "dense")
CHART = "eval-cross_entropy"


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three arms and three seeds, each arm at its own cost."""
    folder = tmp_path_factory.mktemp("comparison")
    results, curves, tuning = [], [], []
    for number, arm in enumerate(ARMS):
        for seed in (1, 2, 3):
            scores = [7 - 0.8 * step**0.5 - 0.2 * number + 0.03 * seed + 0.01 * (seed * step % 3) for step in range(12)]
            results.append(result(arm, seed, scores[-1], critic_flops=number * 10**9, seconds=20.0 + number))
            curves += curve(arm, seed, scores, flops=10 + 3 * number, before=900 * number, seconds=0.1 + 0.02 * number)
            run = folder / "runs" / arm / f"seed-{seed}"
            write_run(run, [], {}, objective=arm, critic=None if number == 0 else "critics/one", seed=seed)
        tuning += [
            {
                "arm": arm,
                "optim.learning_rate": rate,
                "player.preset": "1m",
                "cross_entropy": 5 - rate,
                "is_chosen": int(rate == 0.01),
            }
            for rate in (0.001, 0.003, 0.01)
        ]
    write_comparison(folder, results, curves, tuning)
    write_reports(folder, "cross_entropy")
    return folder / "report.html"


def means_of(page_file: Path, arm: str, column: str) -> list[float]:
    """The mean over seeds at each evaluation, from the CSV file and nothing else."""
    with (page_file.parent / "curves.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["arm"] == arm]
    steps = sorted({int(row["step"]) for row in rows})
    return [sum(float(row[column]) for row in rows if int(row["step"]) == step) / 3 for step in steps]


def assert_drawn_against(page, page_file: Path, axis: str) -> None:
    drawn = drawn_in(page, CHART)
    assert [trace["name"] for trace in drawn] == list(ARMS)
    for trace in drawn:
        assert trace["x"] == pytest.approx(means_of(page_file, trace["name"], axis), rel=1e-5)
        assert trace["y"] == pytest.approx(means_of(page_file, trace["name"], "cross_entropy"), rel=1e-5)
        assert len(trace["x"]) == 12


def test_the_chart_holds_the_means_on_every_axis(page_file: Path, open_page):
    page = open_page(page_file)
    assert page.locator("input[name=axis]").count() == len(AXES) and page.locator(".plot").count() == 1
    titles = set()
    for axis in AXES:
        page.check(f"input[name=axis][value={axis}]")
        assert_drawn_against(page, page_file, axis)
        titles.add(page.evaluate(f"document.getElementById('{CHART}').layout.xaxis.title.text"))
    assert len(titles) == len(AXES)


def test_axes_and_arms_are_chosen_by_the_keyboard(page_file: Path, open_page):
    page = open_page(page_file)
    page.locator("input[name=axis][value=tokens]").focus()
    for axis in (*AXES[1:], AXES[0]):
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.value") == axis
        assert_drawn_against(page, page_file, axis)
    page.locator("input[name=run][value='1']").focus()
    page.keyboard.press("Space")
    assert [trace["visible"] for trace in drawn_in(page, CHART)] == [True, False, True]
    page.get_by_label("article").check()
    assert [trace["visible"] for trace in drawn_in(page, CHART)] == [True, True, True]


def test_arrow_keys_read_the_arms(page_file: Path, open_page):
    page = open_page(page_file)
    page.get_by_label("dense").uncheck()
    plot = page.locator(f"#{CHART}")
    plot.focus()
    plot.press("ArrowRight")
    first, second, _ = drawn_in(page, CHART)
    said = page.locator(f"#{CHART} + .readout").text_content()
    assert said == f"100 training tokens: cross_entropy {first['y'][0]:g}, article {second['y'][0]:g}"
    page.check("input[name=axis][value=all_flops]")
    plot.press("ArrowRight")
    said = page.locator(f"#{CHART} + .readout").text_content()
    assert said.startswith("1,000 FLOPs") and said.endswith(f": cross_entropy {first['y'][0]:g}")


def test_every_control_is_reached_by_the_keyboard(page_file: Path, open_page):
    page = open_page(page_file)
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.name || ''")
        )
    labels = page.evaluate("[...document.querySelectorAll('.plot, .save, .scroll')].map(e => e.ariaLabel)")
    assert {*labels, "run", "axis"} <= reached and len(labels) == 9
    rows = page.locator(".settings tbody tr:visible")
    assert rows.count() == 2  # objective and critic
    page.get_by_label("only what differs").uncheck()
    assert rows.count() > 5


def test_saved_data_are_what_is_drawn(page_file: Path, open_page):
    page = open_page(page_file)
    page.get_by_label("article").uncheck()
    page.check("input[name=axis][value=all_flops]")
    with page.expect_download() as download:
        page.click(f"button[data-chart={CHART}]")
    assert download.value.suggested_filename == f"{CHART}.csv"
    header, *rows = csv.reader(io.StringIO(Path(download.value.path()).read_text(encoding="utf-8")))
    assert header[1:] == ["all_flops", "cross_entropy"]
    shown = [trace for trace in drawn_in(page, CHART) if trace["name"] != "article"]
    expected = [(each["name"], x, y) for each in shown for x, y in zip(each["x"], each["y"], strict=True)]
    assert [(name, float(x), float(y)) for name, x, y in rows] == expected and len(rows) == 24


def test_words_are_of_arms(page_file: Path, open_page):
    page = open_page(page_file)
    assert page.locator("h1").text_content() == "3 arms, 3 seeds"
    assert [legend.strip() for legend in page.locator("legend").all_text_contents()] == ["Arms", "Against"]
    corners = page.locator("thead tr th:first-child").all_text_contents()
    assert corners == ["arm"] * 4 + ["optim.learning_rate, player.preset", ""]
    assert page.locator("tbody .unit", has_text="baseline").count() == 4
    verdicts = page.locator("#outcome-heading ~ .scroll .difference").all_text_contents()
    assert len(verdicts) == 6  # of two arms, and of their best and final evaluations, which are alike in all
    assert all(text.startswith("better −") for text in verdicts[::3])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_page_is_wider_than_its_window(scheme: str, page_file: Path, open_page):
    for width in WIDTHS:
        page = open_page(page_file, width=width, scheme=scheme)
        wait_until(page, ARE_DRAWN)
        assert not has_sideways_scrolling(page)
        grounds = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, document.querySelector('.plot').layout.paper_bgcolor]"
        )
        assert grounds == (["rgb(255, 255, 255)", "#ffffff"] if scheme == "light" else ["rgb(20, 23, 26)", "#14171a"])
        plot = page.locator(".plot").bounding_box()
        assert plot["width"] > 0.85 * min(width, 1240)
