"""A comparison's report is made of its CSV files, warns of what is so and nothing else, and obeys no word in them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs

from avatarl import UserError
from avatarl.comparison.measures import read_rows
from avatarl.comparison.report import mean_curves, page_values, write_reports
from avatarl.sanitise import OBEYED, one_line

from ..results.reports import HOSTILE, Page, write_run
from ..results.test_report_untrusted import ELEMENTS
from .rows import TUNING, curve, frame, result, write_comparison, write_small_comparison

BASE = "cross_entropy"
TABLES = ("results.csv", "curves.csv", "tuning.csv")


def add_runs(folder: Path) -> None:
    """What a comparison of :func:`write_small_comparison` keeps of its runs, in so far as a report reads it."""
    for arm, objective in ((BASE, "cross_entropy"), ("article", "avatarl")):
        for seed in (1, 2):
            out = folder / "runs" / arm / f"seed-{seed}"
            write_run(out, [], {}, objective=objective, seed=seed, out=str(out))


def of_any_time(text: str) -> str:
    """A report without its date and command."""
    text, count = re.subn(r"(?m)^.*Written .*$", "", text)
    assert count == 1
    return text


def both(folder: Path) -> tuple[str, str]:
    write_reports(folder, BASE)
    return tuple(of_any_time((folder / f"report.{kind}").read_text(encoding="utf-8")) for kind in ("md", "html"))


# --- from CSV files ---------------------------------------------------------------------------------------------------


def test_the_csv_files_are_enough_to_make_it_again(tmp_path: Path, monkeypatch):
    whole = write_small_comparison(tmp_path / "whole")
    add_runs(whole)
    markdown, page = both(whole)
    kept = tmp_path / "kept"
    kept.mkdir()
    for name in TABLES:
        shutil.copy(whole / name, kept)
    monkeypatch.setattr("sys.argv", ["/elsewhere/avatarl", "another", "command"])
    again, page_again = both(kept)
    assert "with avatarl another command\n" in (kept / "report.md").read_text(encoding="utf-8")
    assert again == markdown.partition("\n## What the arms differ in")[0]
    assert page_again == re.sub(r'\n<section aria-labelledby="settings-heading".*?</section>\n', "", page, flags=re.S)
    assert len(again) > 3000 and "settings-heading" in page and "settings-heading" not in page_again
    assert both(kept) == (again, page_again)


def test_the_settings_are_those_in_which_the_arms_differ(tmp_path: Path):
    folder = write_small_comparison(tmp_path)
    add_runs(folder)
    markdown, _ = both(folder)
    page = Page(folder / "report.html")
    assert page.tables["Settings"]["objective"] == ["cross_entropy", "avatarl"]
    assert page.tables["Settings"][""] == ["cross_entropybaseline", "article"]
    assert page.tables["Settings"]["seed"] == ["1", "1"]  # of each arm's first run
    assert "out" not in page.tables["Settings"]  # which differs, and says nothing
    assert "| objective | `cross_entropy` | avatarl |" in markdown and "| block_size |" not in markdown


def test_page_and_markdown_have_the_same_tables(tmp_path: Path):
    """Numbers by hand: 3.26 and 3.52 against 4.25 and 4.50, so −0.99 and −0.98."""
    folder = write_small_comparison(tmp_path)
    markdown, _ = both(folder)
    page = Page(folder / "report.html")
    own = ["0.2500 ± 0.0000 0.0000 [0.0000 to 0.0000], p 1"] * 2
    outcome = ["3.3900 ± 0.1838", "−0.9850 better −22.51 %", "−1.0485 to −0.9215", "0.0032", *own, "2"]
    assert page.tables["Outcome"]["article"] == outcome
    plain = markdown.replace("`", "")
    assert "| article | 3.3900 ± 0.1838 | −0.9850 (−22.51 %, better) | −1.0485 to −0.9215 | 0.0032 | 0.2500 ±" in plain
    assert "| cross_entropy (baseline) | 4.3750 ± 0.1768 | — | — | — | 0.2500 ± 0.0000 | 0.2500 ± 0.0000 | 2 |" in plain
    assert page.tables["Outcome"]["cross_entropy baseline"][0] == "4.3750 ± 0.1768"
    search = page.tables["The search"]["0.1, 1m"]
    assert search == ["4.9000", "yes, at the edge of optim.learning_rate"]
    assert "| 0.1, 1m | 4.9000 | yes, at the edge of optim.learning_rate |" in plain
    assert "| optim.learning_rate, player.preset | best validation cross-entropy | chosen |" in plain
    for heading in ("At equal cost", "Calibration and accuracy", "What a run took"):
        for cells in page.tables[heading].values():
            for text in cells:
                assert text.split(" better ")[0].split(" worse ")[0] in plain.replace("(", "").replace(")", "")
    assert "are of training steps" in markdown and "a machine" in markdown
    for text in (markdown, (folder / "report.html").read_text(encoding="utf-8")):
        text = " ".join(text.split())
        assert "none is corrected for there being many: 3 here, 3 at equal cost, 7 of calibration and accuracy." in text
        assert "of a run's own training steps alone: what it took to make caches and to train critics is not" in text


def test_without_a_search_there_is_no_section_of_it(tmp_path: Path):
    folder = write_comparison(tmp_path, [result(BASE, 1, 5.0)], curve(BASE, 1, [5.0]))
    markdown, page = both(folder)
    assert "The search</h2>" not in page and "## The search" not in markdown
    assert "1 arm, 1 seed\n" in markdown and "<h1>1 arm, 1 seed</h1>" in page


@pytest.mark.parametrize("name", ["report.md", "report.html", "outcome.svg"])
@pytest.mark.parametrize("link", ["{}", ".{}.partial"])
def test_a_link_where_a_report_is_written_is_refused(tmp_path: Path, name: str, link: str):
    folder = write_small_comparison(tmp_path / "comparison")
    (tmp_path / "outside").write_text("precious")
    (folder / link.format(name)).symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="is a link"):
        write_reports(folder, BASE)
    assert (tmp_path / "outside").read_text() == "precious"


@pytest.mark.parametrize("name", TABLES)
def test_a_missing_file_is_named(tmp_path: Path, name: str):
    (write_small_comparison(tmp_path) / name).unlink()
    with pytest.raises(UserError, match=f"{name}: no such file"):
        write_reports(tmp_path, BASE)
    assert not (tmp_path / "report.md").exists()


# --- curves -----------------------------------------------------------------------------------------------------------


def test_curves_are_means_over_seeds(tmp_path: Path):
    folder = write_small_comparison(tmp_path)
    charts = mean_curves(read_rows(folder / "curves.csv"), (BASE, "article"))
    (chart,) = charts.charts
    assert [series["y"] for series in chart["series"]] == [[5.375, 4.375, 4.875], [6.39, 3.89, 3.39]]
    assert charts.axes["eval"][1] == {
        "tokens": [100, 200, 300],
        "flops": [2000, 4000, 6000],
        "all_flops": [3500, 5500, 7500],
        "seconds": [10, 20, 30],
    }
    assert list(charts.titles) == ["tokens", "flops", "all_flops", "seconds"]


def test_a_mean_is_of_all_seeds_or_not_there():
    rows = [*curve("a", 1, [5.0, 4.0, 3.0]), *curve("a", 2, [6.0, 5.0])]
    charts = mean_curves(frame(rows), ("a",))
    assert charts.charts[0]["series"] == [{"run": 0, "y": [5.5, 4.5]}]
    assert charts.axes["eval"][0]["tokens"] == [100, 200]


def test_an_unknown_cost_is_no_axis():
    rows = [*curve("a", 1, [5.0, 4.0]), *curve("b", 1, [5.0, 4.0], before=None)]
    assert list(mean_curves(frame(rows), ("a", "b")).titles) == ["tokens", "flops", "seconds"]


# --- warnings ---------------------------------------------------------------------------------------------------------


def test_runs_that_gave_up_are_named_and_left_out(tmp_path: Path):
    whole = write_small_comparison(tmp_path / "whole")
    without, _ = both(whole)
    results, curves, tuning = (read_rows(whole / name).to_dict("records") for name in TABLES)
    lost = [{"arm": "article", "seed": 3}, {"arm": "hasty", "seed": 1}]
    folder = write_comparison(tmp_path / "with", results + lost, curves, tuning)
    add_runs(folder)
    markdown, page = both(folder)
    said = "Gave up, as refused/ in their folders says; excluded, which favours these arms"
    assert re.search(rf"{said}: .*article.*seed 3.*hasty.*seed 1", markdown) and said in page
    kept, expected = (
        [line for line in text.partition("\n## What the arms differ in")[0].splitlines() if line.strip()]
        for text in (re.sub(r"\*\*Mind:\*\*.*", "", report) for report in (markdown, without))
    )
    assert kept == expected


def warnings_of(results: list[dict]) -> list[tuple[str, list[str]]]:
    curves = [row for each in results for row in curve(each["arm"], each["seed"], [5.0])]
    return [(words.split(",")[0], arms) for words, arms in values_of(results, curves)["warnings"]]


def values_of(results: list[dict], curves: list[dict], tuning: Sequence[dict] = ()) -> dict:
    return page_values(frame(results), frame(curves), frame(tuning, None if tuning else TUNING), "a")


ONE = "One seed: how far another would move a number cannot be told"
UNEVEN, UNKNOWN = "Other seeds than the baseline's", "Critics that were made elsewhere"
UNLIKE = "Not as the baseline in what stands in brackets"
INHERITED, UNSEARCHED = "Settings that were searched for another arm", "Settings that were not searched"
AT_EDGE = "A searched value at the edge of the grid"


@pytest.mark.parametrize(
    ("seeds", "unknown", "expected"),
    [
        ({"a": (1, 2), "b": (1, 2)}, (), []),
        ({"a": (1,), "b": (1,)}, (), [(ONE, [])]),
        ({"a": (1, 2), "b": (1, 2), "c": (2,), "d": (1, 2, 3)}, (), [(UNEVEN, ["c", "d"])]),
        ({"a": (1, 2), "b": (3, 4)}, (), [(UNEVEN, ["b"])]),
        ({"a": (1, 2), "b": (1, 2), "c": (1, 2)}, ("b", "c"), [(UNKNOWN, ["b", "c"])]),
        ({"a": (1,), "b": (2,)}, ("b",), [(ONE, []), (UNEVEN, ["b"]), (UNKNOWN, ["b"])]),
    ],
)
def test_warnings_are_of_what_is_so(seeds: dict, unknown: tuple, expected: list):
    results = [
        result(arm, seed, 5.0, critic_training_flops=None if arm in unknown else 0)
        for arm, numbers in seeds.items()
        for seed in numbers
    ]
    assert warnings_of(results) == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parameters": 999}, "parameters"),
        ({"unique_tokens": 999, "tokens": 999}, "unique tokens, training tokens"),
        ({"device": "another", "precision": "fp32"}, "device"),
    ],
)
def test_an_arm_that_is_not_as_the_baseline_is_named_with_what_differs(tmp_path: Path, changes: dict, words: str):
    results = [result(arm, seed, 5.0, **changes if (arm, seed) == ("b", 2) else {}) for arm in "abc" for seed in (1, 2)]
    assert warnings_of(results) == [(UNLIKE, [f"b ({words})"])]
    curves = [row for each in results for row in curve(each["arm"], each["seed"], [5.0])]
    for text in both_of(tmp_path / "unlike", results, curves):
        assert "order of the data (but for what is said above of b), and is called" in " ".join(text.split())
    for text in both_of(tmp_path / "alike", [result(arm, 1, 5.0) for arm in "ab"], curves[:1] + curves[2:3]):
        assert "the same order of the data, and is called" in " ".join(text.split())


def both_of(folder: Path, results: list[dict], curves: list[dict]) -> list[str]:
    write_reports(write_comparison(folder, results, curves), "a")
    return [(folder / f"report.{kind}").read_text(encoding="utf-8") for kind in ("md", "html")]


def test_another_number_of_evaluations_is_named():
    results = [result(arm, 1, 5.0) for arm in "abc"]
    curves = [*curve("a", 1, [5.0, 4.0]), *curve("b", 1, [5.0, 4.0]), *curve("c", 1, [5.0, 4.5, 4.0])]
    warnings = values_of(results, curves)["warnings"]
    assert [names for words, names in warnings if words.startswith(UNLIKE)] == [["c (number of evaluations)"]]


def test_seconds_that_vary_are_named():
    def results(*seconds: float) -> list[dict]:
        return [result(arm, seed, 5.0, seconds=each) for arm in "ab" for seed, each in enumerate(seconds)]

    assert warnings_of(results(100.0, 109.0, 105.0)) == []
    said = "The same work took the baseline up to 12 % longer with one seed than with another"
    assert warnings_of(results(100.0, 112.0, 105.0)) == [(said, [])]
    of_another = [row | {"seconds": 1.0} if row["arm"] == "b" else row for row in results(100.0, 109.0)]
    of_another[-1]["seconds"] = 9.0
    assert warnings_of(of_another) == []


@pytest.mark.parametrize(
    ("column", "values", "named"),
    [
        ("revision", ("1234567", "1234567", "89e1"), ("Runs of several revisions", ["1234567", "89e1"])),
        ("revision", ("1234567, 89e1",) * 3, ("Runs of several revisions", ["1234567", "89e1"])),
        ("revision", (None, "89e1", "89e1"), ("Runs of several revisions", ["89e1", "unknown"])),
        ("revision", (None, None, None), None),
        ("torch", ("2.12.0", "2.13.0", "2.13.0"), ("Runs with several versions of PyTorch", ["2.12.0", "2.13.0"])),
        ("torch", ("2.13.0", "2.13.0+cu130", "2.13.0, 2.13.0+cpu"), None),
        ("precision", ("bf16", "bf16", "fp32"), ("Runs in several precisions", ["bf16", "fp32"])),
    ],
)
def test_runs_of_several_origins_are_named(column: str, values: tuple, named: tuple | None):
    results = [result("a", seed, 5.0, **{column: value}) for seed, value in enumerate(values)]
    assert warnings_of(results) == ([named] if named else [])


def test_how_the_arms_were_tuned_is_told():
    """``a`` and ``b`` were searched, ``a`` to the edge of the rate; ``c`` inherits it, ``d`` has a rate of its own."""
    tuning = [
        {"arm": arm, "rate": rate, "decay": 0.25, "cross_entropy": 5.0, "is_chosen": int(rate == chosen)}
        for arm, chosen in (("a", 4), ("b", 2))
        for rate in (1, 2, 4)
    ]
    own = {"tuned_as": "a", "tuned_settings": "rate=4; decay=0.25"}
    results = [
        result("a", 1, 5.0, **own),
        result("b", 1, 5.0, tuned_as="b", tuned_settings="rate=2; decay=0.25"),
        result("c", 1, 5.0, **own),
        result("d", 1, 5.0, **own | {"tuned_settings": "rate=44; decay=0.25"}),
        result("e", 1, 5.0, tuned_as=None, tuned_settings="rate=4; decay=0.25"),
    ]
    curves = [row for each in results for row in curve(each["arm"], 1, [5.0])]
    warnings = values_of(results, curves, tuning)["warnings"]
    assert [(words.split(",")[0], names) for words, names in warnings[1:]] == [
        (INHERITED, ["c (for a)", "d (for a)"]),
        (UNSEARCHED, ["e"]),
        (AT_EDGE, ["a (rate)", "c (rate)"]),
    ]


def test_of_files_from_before_nothing_is_said_that_they_do_not_hold():
    added = {"tuned_as", "tuned_settings", "precision", "revision", "torch"}
    results = [{name: value for name, value in result("a", seed, 5.0).items() if name not in added} for seed in (1, 2)]
    assert warnings_of(results) == []


def test_warnings_are_sentences_on_both_pages(tmp_path: Path):
    results = [result(BASE, 1, 5.0), result("outside", 1, 4.0, critic_training_flops=None)]
    folder = write_comparison(tmp_path, results, [row for arm in (BASE, "outside") for row in curve(arm, 1, [5.0])])
    markdown, page = both(folder)
    sentence = "Critics that were made elsewhere, so that what they cost to train is unknown: outside."
    assert f"**Mind:** {sentence}\n" in markdown and f"<b>Mind:</b> {sentence}</p>" in page
    assert markdown.count("**Mind:**") == page.count("<b>Mind:</b>") == 2


# --- text from outside ------------------------------------------------------------------------------------------------


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A comparison in which every word that can be from outside is an attack; names of arms cannot."""
    words = dict.fromkeys(("device", "objective", "precision", "revision", "torch", "tuned_as"), HOSTILE)
    results = [result(arm, seed, 5.0, **words) for arm in "ab" for seed in (1, 2)]
    curves = [row for each in results for row in curve(each["arm"], each["seed"], [5.0, 4.0])]
    tuning = [{"arm": "a", "player.preset": HOSTILE, "cross_entropy": 5.0, "is_chosen": 1}]
    folder = write_comparison(tmp_path, results, curves, tuning)
    for arm in "ab":
        settings = {HOSTILE: HOSTILE + arm, "critic": [HOSTILE, arm], "objective": HOSTILE + arm}
        write_run(folder / "runs" / arm / "seed-1", [], {"device": HOSTILE}, **settings)
    write_reports(folder, "a")
    return folder


def test_hostile_words_are_text_on_the_page(hostile: Path):
    page = Page(hostile / "report.html")
    assert page.tags <= ELEMENTS | {"img"}  # the outcome's picture
    text = (hostile / "report.html").read_text(encoding="utf-8")
    assert text.count("<img ") == 1
    assert text.count("<script>") == 2  # plotly's and ours
    assert not OBEYED.search(page.text)
    assert page.text.count("<script>alert(1)</script>") >= 8
    assert page.tables["Settings"]["objective"][1].startswith('"<script>alert(1)</script>|`x`\\u202E')


def test_hostile_words_are_code_in_markdown(hostile: Path):
    text = (hostile / "report.md").read_text(encoding="utf-8")
    assert not OBEYED.search(text)
    outside = re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "CODE", text)
    assert "<script" not in outside and "<b>" not in outside and "&amp;" not in outside
    headings = [line for line in outside.splitlines() if line.startswith("#")]
    assert len(headings) == 7
    tables = [text for text in outside.split("\n\n") if text.startswith("| ")]
    assert len(tables) == 6
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.strip().splitlines()}) == 1


def test_the_page_asks_for_nothing_of_a_network(tmp_path: Path):
    folder = write_small_comparison(tmp_path)
    add_runs(folder)
    write_reports(folder, BASE)
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert get_plotlyjs() in text
    own = text.replace(get_plotlyjs(), "")
    own, pictures = re.subn(r'src="data:image/svg\+xml;base64,[\w+/=]+"', "", own)
    assert pictures == 1
    assert not re.findall(r"https?:|//[\w.]+/|@import|url\(|\bsrc=", own)
    assert set(re.findall(r'href="([^"]*)"', own)) == {"data:,", "#main"}
    assert "default-src 'none'" in own and "Written" in own
    assert one_line(own.partition("<title>")[2].partition("</title>")[0]) == f"{BASE}, article – avatarl compare"
