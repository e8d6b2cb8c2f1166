"""What a report says of runs is what their folders and an evaluation say."""

from __future__ import annotations

import ast
import json
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from plotly.offline import get_plotlyjs

import avatarl
from avatarl import UserError
from avatarl.cli import main
from avatarl.results import evaluate
from avatarl.results.charts import CHARTED, MOST_POINTS, charts_of, stretch_means
from avatarl.results.report import report
from avatarl.results.reporter import Cell, Row, Table, fixed, line_style, signed
from avatarl.results.runs import read_runs

from .reports import (
    CRITIC_FLOPS,
    PLAYER_FLOPS,
    TOKENS_PER_STEP,
    Page,
    line,
    made_up_lines,
    report_of,
    write_data,
    write_run,
)


@pytest.fixture(scope="module")
def trained_page(trained: list[Path]) -> Page:
    """The report on both, with three windows evaluated and two prompts continued."""
    out = trained[0].parent / "report.html"
    report(trained, out, max_windows=3, prompts=["quick fox", ""], sample_tokens=5, device="cpu", quiet=True)
    return Page(out)


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_evaluate(trained: list[Path], trained_page: Page, data_folder: Path):
    player, twin = (evaluate(run, data_folder, max_windows=3, device="cpu") for run in trained)
    rows = trained_page.tables["Results"]
    for row, metric, scale, digits in (
        ("cross-entropy nats per token", "cross_entropy", 1, 3),
        ("bits per byte bits", "bits_per_byte", 1, 3),
        ("perplexity", "perplexity", 1, 1),
        ("top-1 accuracy % of tokens", "top1_accuracy", 100, 1),
        ("top-16 accuracy % of tokens", "top16_accuracy", 100, 1),
        ("entropy nats", "entropy", 1, 2),
        ("expected calibration error % of probability", "expected_calibration_error", 100, 2),
        ("calibration error, top 16 % of probability", "top16_calibration_error", 100, 2),
    ):
        of_player, of_twin = player[metric] * scale, twin[metric] * scale
        change = round(of_player - of_twin, digits)
        assert rows[row][1] == f"{of_twin:,.{digits}f}"
        assert rows[row][0].split()[0] == f"{of_player:,.{digits}f}"
        if change:
            assert rows[row][0].split()[-1] == f"{change:+,.{digits}f}".replace("-", "−")
    assert rows["tokens evaluated"] == [str(player["tokens"])] * 2
    drawn = {chart["id"]: chart["series"] for chart in trained_page.drawn["reliability"]}
    for metric in ("reliability", "top16_reliability"):
        kept = [row for row in player[metric] if metric == "reliability" or row["accuracy"] > 0]
        assert drawn[metric][0]["y"] == [float(f"{row['accuracy']:.6g}") for row in kept]
        assert drawn[metric][0]["count"] == [row["count"] for row in kept]
    table = trained_page.tables["Reliability of the most likely token"]
    assert [str(row["count"]) for row in twin["reliability"]] <= [cells[0] for cells in table.values() if cells]


def test_the_numbers_are_those_of_the_logs(trained: list[Path], trained_page: Page):
    results, overview = trained_page.tables["Results"], trained_page.tables["What was trained on what"]
    for number, run in enumerate(trained):
        lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
        training = [entry for entry in lines if entry["event"] == "train"]
        evaluations = [entry for entry in lines if entry["event"] == "eval"]
        best = min(evaluations, key=lambda entry: entry["cross_entropy"])
        assert results["best validation cross-entropy nats per token"][number].startswith(
            f"{best['cross_entropy']:.3f}"
        )
        assert results["reached at training tokens"][number].split()[0] == str(best["tokens"])
        flops = (training[-1]["player_flops"] + training[-1]["critic_flops"]) / 1e6
        assert results["FLOPs of player and critics MFLOPs"][number].split()[0] == f"{flops:.3f}"
        sizes = json.loads((run / "environment.json").read_text())["sizes"]
        assert overview["parameters"][number] == f"{sizes['parameters']:,}"
        assert overview["outside the embedding"][number] == f"{sizes['non_embedding_parameters']:,}"
        assert overview["training tokens"][number] == str(8 * 4 * 16)
        assert overview["state"][number] == "finished, 8 steps"
        drawn = {chart["id"]: chart["series"] for chart in trained_page.drawn["charts"]}
        of_run = {series["run"]: series["y"] for series in drawn["train-cross_entropy"]}
        assert of_run[number] == [float(f"{entry['cross_entropy']:.6g}") for entry in training]
    assert results["expected reward at the end % of the best possible"][1] == "—"
    assert trained_page.tables["What was trained on what"]["critic"][1] == "none"
    assert trained_page.tables["What was trained on what"]["objective"] == ["avatarl", "cross_entropy"]


def test_samples_stand_side_by_side(trained_page: Page):
    assert trained_page.text.count("quick fox") == 3  # the heading, and both continuations
    assert "“quick fox”" in trained_page.text and "Beginning of a document" in trained_page.text


def test_training_time_is_that_of_the_steps(tmp_path: Path):
    """The second thousand tokens took twice as long as the first."""
    lines = [line("train", 1, tokens_per_second=1024.0), line("train", 2, tokens_per_second=512.0)]
    page = report_of([write_run(tmp_path / "run", lines)], tmp_path / "report.html")
    assert page.tables["Results"]["training time s"] == ["6"]
    assert page.tables["Results"]["throughput tokens per second"] == [f"{2 * TOKENS_PER_STEP / 6:.0f}"]
    assert page.tables["What was trained on what"]["training time"] == ["0 min 6 s"]


def test_differences_are_better_or_worse(tmp_path: Path):
    runs = [
        write_run(tmp_path / name, [line("eval", 1, cross_entropy=value, expected_reward_share=share)], objective=name)
        for name, value, share in (("avatarl", 4.5, 0.2), ("cross_entropy", 5.0, 0.1), ("ppo", 5.25, 0.1))
    ]
    rows = report_of(runs, tmp_path / "report.html").tables["Results"]
    assert rows["best validation cross-entropy nats per token"] == [
        "4.500 better −0.500",
        "5.000",
        "5.250 worse +0.250",
    ]
    assert rows["expected reward at the end % of the best possible"] == ["20.0 better +10.0", "10.0", "10.0 ±0"]
    rows = report_of(runs, tmp_path / "report.html", baseline=runs[2]).tables["Results"]
    assert rows["best validation cross-entropy nats per token"] == [
        "4.500 better −0.750",
        "5.000 better −0.250",
        "5.250",
    ]


def test_a_critic_is_no_baseline_of_the_players_that_it_judged(tmp_path: Path):
    critic = write_run(tmp_path / "critic", [line("eval", 1, cross_entropy=6.0)], objective="cross_entropy")
    player = write_run(tmp_path / "player", [line("eval", 1, cross_entropy=4.5)], critic=str(critic))
    twin = write_run(tmp_path / "twin", [line("eval", 1, cross_entropy=5.0)], objective="cross_entropy")
    name = "best validation cross-entropy nats per token"
    rows = report_of([critic, player, twin], tmp_path / "report.html").tables["Results"]
    assert rows[name] == ["6.000 worse +1.000", "4.500 better −0.500", "5.000"]
    rows = report_of([player, critic], tmp_path / "report.html").tables["Results"]
    assert rows[name] == ["4.500 better −1.500", "6.000"]


def test_the_best_evaluation_is_not_the_last(tmp_path: Path):
    """Rewards are those of the last."""
    scores = ((1, 5.0, 0.1), (2, 4.0, 0.2), (3, 4.5, 0.3))
    lines = [line("eval", n, cross_entropy=score, expected_reward_share=share) for n, score, share in scores]
    rows = report_of([write_run(tmp_path / "run", lines)], tmp_path / "report.html").tables["Results"]
    assert rows["best validation cross-entropy nats per token"] == ["4.000"]
    assert rows["reached at training tokens"] == [f"{2 * TOKENS_PER_STEP:,}"]
    assert rows["expected reward at the end % of the best possible"] == ["30.0"]


def test_the_baseline_is_one_of_the_runs(tmp_path: Path):
    run = write_run(tmp_path / "run", [])
    with pytest.raises(UserError, match="baseline is elsewhere; expected one of the runs: .*run"):
        report([run], tmp_path / "report.html", baseline="elsewhere")


def test_only_what_can_be_compared_is(tmp_path: Path, monkeypatch):
    """Other data may be other text: no number of one is set against the other's."""
    scores = dict.fromkeys(("cross_entropy", "perplexity", "top1_accuracy", "bits_per_byte"), 2.0) | {"tokens": 5}
    tables = {"reliability": [], "top16_reliability": []}
    values = iter((scores | tables, dict.fromkeys(scores, 1.0) | tables))
    monkeypatch.setattr("avatarl.results.report.evaluate_model", lambda *_, **__: next(values))
    monkeypatch.setattr("avatarl.results.report.generate", lambda *_, **__: ["text"])
    runs = []
    for number, name in enumerate(("first", "second")):
        data = write_data(tmp_path / f"data-{name}", train_tokens=100 + number)
        record = {"identity": {"tokenizer": name}, "sizes": {"unique_tokens": 50} if number else {}}
        run = write_run(tmp_path / name, [line("eval", 50, cross_entropy=3.0)], record, data=str(data))
        (run / "player").mkdir()
        runs.append(run)
    report(runs, tmp_path / "report.html", prompts=["a"], quiet=True)
    page = Page(tmp_path / "report.html")
    assert page.tables["Results"]["bits per byte bits"] == ["2.000", "1.000"]
    assert page.tables["Results"]["cross-entropy nats per token"] == ["2.000", "1.000"]
    assert page.tables["Results"]["best validation cross-entropy nats per token"] == ["3.000", "3.000"]
    assert "different tokenizers" in page.text and "different data" in page.text
    assert page.tables["What was trained on what"]["epochs"] == [f"{50 * 2048 / 100:.2f}", f"{50 * 2048 / 50:.2f}"]


def test_rewards_compare_only_where_they_are_the_same(tmp_path: Path):
    lines = [[line("eval", 1, cross_entropy=4.0, expected_reward_share=share)] for share in (0.1, 0.3, 0.3, 0.3, 0.3)]
    rules = [{"top_k": 16}, {"top_k": 4}, {"top_k": 16}, {"top_k": 16}, {"top_k": 16}]
    digests = ["a", "a", "b", "a", "a"]
    paths = ["critic", "critic", "critic", "moved", "critic"]
    schedules = [{"critic_weight": shape} for shape in ("constant", "constant", "constant", "constant", "linear")]
    runs = [
        write_run(
            tmp_path / f"run{number}",
            lines[number],
            {"identity": {f"critic {paths[number]}": digests[number]}},
            avatarl=rules[number],
            critic=paths[number],
            schedules=schedules[number],
        )
        for number in range(5)
    ]
    rows = report_of(runs, tmp_path / "report.html").tables["Results"]
    found = rows["expected reward at the end % of the best possible"]
    assert found == ["10.0", "30.0", "30.0", "30.0 better +20.0", "30.0"]  # the same critic that was moved


def test_a_lost_record_makes_no_other_data(tmp_path: Path):
    lines = [line("eval", 1, cross_entropy=4.0)]
    runs = [write_run(tmp_path / "a", lines, {"data_digest": "1"}), write_run(tmp_path / "b", lines)]
    page = report_of(runs, tmp_path / "report.html")
    assert "different data" not in page.text
    assert page.tables["Results"]["best validation cross-entropy nats per token"] == ["4.000", "4.000 ±0"]
    other = write_run(tmp_path / "c", lines, {"data_digest": "2"})
    assert "different data" in report_of([runs[0], other], tmp_path / "report.html").text


def test_settings_that_differ_come_first(tmp_path: Path):
    runs = [
        write_run(tmp_path / "one", [], optim={"name": "adamw", "beta1": 0.9}, critic=["a", "b"]),
        write_run(tmp_path / "two", [], optim={"name": "muon"}, critic=["a", "b"], seed=2),
    ]
    rows = report_of(runs, tmp_path / "report.html").tables["Settings"]
    assert list(rows.items())[1:4] == [
        ("seed", ["1", "2"]),
        ("optim.name", ["adamw", "muon"]),
        ("optim.beta1", ["0.9", "—"]),
    ]
    assert rows["critic"] == ["[a, b]", "[a, b]"]
    marked = (tmp_path / "report.html").read_text().count('<tr class="marked">')
    assert marked == 3


def test_of_two_evaluations_at_one_place_the_last_is_shown(tmp_path: Path):
    lines = [line("eval", 1, cross_entropy=5.0), line("eval", 1, cross_entropy=4.0), line("eval", 2)]
    table = report_of([write_run(tmp_path / "run", lines)], tmp_path / "report.html").tables
    shown = table["Validation cross-entropy, nats per token"]
    assert shown[f"{TOKENS_PER_STEP:,}"] == ["4.000"] and shown[f"{2 * TOKENS_PER_STEP:,}"] == [""]


def test_a_resumption_says_what_changed(tmp_path: Path):
    record = {"resumed": [{"step": 5, "started": "2026-01-02T03:04:05+00:00", "changes": ["seed was 1 and is 2"]}]}
    page = report_of([write_run(tmp_path / "run", [], record)], tmp_path / "report.html")
    assert "from step 5, 2026-01-02 03:04:05 UTC: seed was 1 and is 2" in page.text


# --- tables -----------------------------------------------------------------------------------------------------------


def test_a_frame_becomes_rows_in_sections():
    levels = ["section", "name", "unit"]
    index = pd.MultiIndex.from_tuples([("one", "a", "nats"), ("one", "b", ""), ("two", "a", "s")], names=levels)
    table = Table(pd.DataFrame([["1"], [Cell("2", "+1", "worse")], ["3"]], index, ["run"]), marked=[False, True, False])
    assert table.columns == ["run"]
    assert table.sections == [
        ("one", [Row("a", "nats", False, [Cell("1")]), Row("b", "", True, [Cell("2", "+1", "worse")])]),
        ("two", [Row("a", "s", False, [Cell("3")])]),
    ]
    plain = Table(pd.DataFrame({"run": ["1"], "other": ["2"]}, ["a"]))
    assert plain.sections == [("", [Row("a", "", False, [Cell("1"), Cell("2")])])]
    assert Table(pd.DataFrame(columns=["run"])).sections == []


@pytest.mark.parametrize(
    ("value", "as_number", "as_difference"),
    [(1234.5, "1,234.50", "+1,234.50"), (-0.125, "−0.12", "−0.12"), (0.0, "0.00", "0.00"), (-0.001, "−0.00", "0.00")],
)
def test_numbers_as_text(value: float, as_number: str, as_difference: str):
    assert (fixed(value, 2), signed(value, 2)) == (as_number, as_difference)
    assert fixed(None, 2) == fixed(math.nan, 2) == fixed(math.inf, 2) == "—"


# --- curves -----------------------------------------------------------------------------------------------------------


def test_a_stretch_is_what_a_run_that_logs_less_often_would_have_logged():
    lines = 3 * MOST_POINTS
    rng = np.random.default_rng(1)
    values, steps = rng.normal(size=lines), rng.integers(1, 5, size=lines).astype(float)
    expected = (values * steps).reshape(-1, 3).sum(1) / steps.reshape(-1, 3).sum(1)
    np.testing.assert_allclose(stretch_means(values, steps), expected, rtol=1e-12)
    uneven = stretch_means(values[:-700], steps[:-700])
    assert len(uneven) == MOST_POINTS
    np.testing.assert_allclose(uneven[-1], np.average(values[-703:-700], weights=steps[-703:-700]))


def test_gaps_and_lines_without_a_number():
    values = np.ones(2 * MOST_POINTS)
    values[0], values[1] = np.nan, 5.0  # a line of refused steps counts for nothing
    values[3] = np.inf  # one that is no number leaves a gap
    means = stretch_means(values, np.ones(len(values)))
    assert means[0] == 5.0 and math.isnan(means[1]) and (means[2:] == 1).all()
    few = stretch_means(np.array([1.0, np.inf, np.nan, 2.0]), np.ones(4))
    np.testing.assert_array_equal(few, [1.0, np.nan, np.nan, 2.0])


def test_throughput_is_tokens_over_seconds(tmp_path: Path):
    """Of two lines of as many tokens, 1,000 and 3,000 a second, together 1,500 a second."""
    lines = [line("train", n, tokens_per_second=(1000.0, 3000.0)[n % 2]) for n in range(1, 2 * MOST_POINTS + 1)]
    (chart,) = charts_of(read_runs([write_run(tmp_path / "run", lines)], CHARTED)).charts
    assert chart["series"][0]["y"] == [1500.0] * MOST_POINTS


def test_refused_steps_have_no_weight(tmp_path: Path):
    """Of a line of ten steps nine were refused: it counts as one."""
    lines = [line("train", 10, loss=1.0, skipped_steps=9), line("train", 19, loss=2.0, skipped_steps=9)]
    lines += [line("train", 19 + n, loss=7.0, skipped_steps=9) for n in range(1, 2 * MOST_POINTS - 1)]
    (chart,) = charts_of(read_runs([write_run(tmp_path / "run", lines)], CHARTED)).charts
    assert chart["series"][0]["y"][:2] == [1.9, 7.0]


def test_both_axes_stand_at_the_last_line_of_a_stretch(tmp_path: Path):
    runs = [
        write_run(tmp_path / "long", made_up_lines(2 * MOST_POINTS)),
        write_run(tmp_path / "old", [line("train", 7, loss=1.0)]),
    ]
    page = report_of(runs, tmp_path / "report.html")
    long, old = page.drawn["axes"]["train"]
    assert long["tokens"] == [2 * n * TOKENS_PER_STEP for n in range(1, MOST_POINTS + 1)]
    flops = [tokens * (PLAYER_FLOPS + CRITIC_FLOPS) for tokens in long["tokens"]]
    np.testing.assert_allclose(long["flops"], flops, rtol=1e-5)
    assert old == {"tokens": [7 * TOKENS_PER_STEP], "flops": None}
    assert "old: no FLOPs in the log" in page.text
    assert "long: each point of a training curve is the mean of some 2 of its 2,000 lines" in page.text
    (chart,) = [chart for chart in page.drawn["charts"] if chart["id"] == "eval-cross_entropy"]
    assert [series["run"] for series in chart["series"]] == [0]


def test_every_run_looks_otherwise():
    styles = [line_style(run) for run in range(36)]
    assert len({(style["colour"], style["dash"]) for style in styles}) == 36
    assert len({style["dash"] for style in styles[:6]}) == len({style["marker"] for style in styles[:6]}) == 6


def test_four_long_runs_fit_in_six_megabytes(tmp_path: Path):
    lines = made_up_lines(10_000)
    runs = [write_run(tmp_path / f"run-{number}", lines, seed=number) for number in range(4)]
    out = tmp_path / "report.html"
    report_of(runs, out)
    assert out.stat().st_size < 6_000_000
    assert out.stat().st_size - len(get_plotlyjs().encode()) < 900_000


# --- Markdown, files, commands ----------------------------------------------------------------------------------------


def test_markdown_has_the_same_tables(tmp_path: Path):
    runs = [write_run(tmp_path / name, made_up_lines(100, offset, 50)) for name, offset in (("one", 0), ("two", 0.25))]
    page = report_of(runs, tmp_path / "report.html")
    report(runs, tmp_path / "report.md", evaluate=False, quiet=True)
    rows = {}
    for row in (tmp_path / "report.md").read_text(encoding="utf-8").splitlines():
        if row.startswith("| "):
            name, *cells = [cell.strip().strip("`") for cell in row.strip("|").split("|")]
            rows[name.strip("` ")] = cells
    best = page.tables["Results"]["best validation cross-entropy nats per token"]
    value, verdict, change = re.fullmatch(r"([\d.]+) (worse) (\S+)", best[1]).groups()
    assert rows["best validation cross-entropy (nats per token)"] == [best[0], f"{value} ({change}, {verdict})"]
    assert rows["training tokens"] == ["one", "two"]  # the head of the evaluations, after the row of that name
    table = page.tables["Validation cross-entropy, nats per token"]
    assert len(table) == 21  # of fifty evaluations twenty, and the head
    last = made_up_lines(100)[-1]
    assert rows[f"{100 * TOKENS_PER_STEP:,}"] == [f"{last['cross_entropy']:.3f}", f"{last['cross_entropy'] + 0.25:.3f}"]
    assert rows["optim.name"] == ["adamw", "adamw"]


def test_a_report_is_whole_or_not_there(tmp_path: Path, monkeypatch):
    run = write_run(tmp_path / "run", made_up_lines(5))
    out = tmp_path / "report.html"
    out.write_text("the one before")

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("avatarl.durable.os.fsync", fail)
    with pytest.raises(UserError, match="report.html, which cannot be written .*No space left"):
        report([run], out, evaluate=False, quiet=True)
    assert out.read_text() == "the one before"


def test_a_link_beside_a_report_is_not_written_through(tmp_path: Path):
    write_run(tmp_path / "run", made_up_lines(5))
    (tmp_path / "outside").write_text("precious")
    (tmp_path / ".report.md.partial").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match=".report.md.partial is a link"):
        report([tmp_path / "run"], tmp_path / "report.md", evaluate=False, quiet=True)
    assert (tmp_path / "outside").read_text() == "precious" and not (tmp_path / "report.md").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "report.pdf"}, "out is report.pdf; expected a name that ends in .html or .md"),
        ({"out": "nowhere/report.html"}, "out is nowhere/report.html, whose folder does not exist"),
        ({"max_windows": 0}, "max_windows is 0"),
        ({"sample_tokens": 0}, "sample_tokens is 0"),
        ({"data": "nowhere"}, "nowhere/manifest.json: no such file"),
        ({"device": "abacus"}, "device"),
        ({"runs": []}, "runs is empty"),
        ({"runs": ["nowhere"]}, "run nowhere: no such folder; expected a run folder"),
    ],
)
def test_a_wrong_setting_is_found_before_anything_is_read(tmp_path: Path, monkeypatch, options: dict, message: str):
    monkeypatch.chdir(tmp_path)
    settings = {"runs": [str(write_run(tmp_path / "run", []))], "out": "report.html", **options}
    with pytest.raises(UserError, match=re.escape(message)):
        report(**settings)


def test_the_command_writes_what_it_says(tmp_path: Path, capsys):
    run, out = write_run(tmp_path / "run", made_up_lines(5)), tmp_path / "report.html"
    assert main(["report", str(run), "--out", str(out), "--evaluate", "false"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert "Content-Security-Policy" in out.read_text(encoding="utf-8")
    assert main(["report", str(run), "--out", str(tmp_path / "report.txt")]) == 2
    assert "expected a name that ends in .html or .md" in capsys.readouterr().err


def test_nothing_but_its_command_needs_the_report():
    package = Path(avatarl.__file__).parent
    importers = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = getattr(node, "module", None) or ""
            names = [name.name for name in node.names] if isinstance(node, ast.ImportFrom) else []
            is_beside = path.parent.name == "results" and (module == "report" or not module and "report" in names)
            if is_beside or module.endswith("results.report") or module.endswith("results") and "report" in names:
                importers.add(path.relative_to(package).as_posix())
    assert not importers  # the table of commands names it
