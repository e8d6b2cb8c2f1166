"""Rows say what runs measured, keep their numbers as CSV, and charge a run with what its critics took."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from avatarl import UserError
from avatarl.comparison import ComparisonConfig, TuningConfig, measures
from avatarl.comparison.measures import (
    CURVE,
    RESULT,
    WORDS,
    curve_rows,
    read_rows,
    result_row,
    seconds_until,
    spent_before,
    tuning_rows,
    write_rows,
)
from avatarl.comparison.progress import Member, Tuned
from avatarl.data import PreparedData
from avatarl.results import evaluate
from avatarl.training import train

from ..results.reports import EVALUATION, TOKENS_PER_STEP, made_up_lines, write_run

SIZES = {"parameters": 5, "unique_tokens": 50, "tokens": 5 * TOKENS_PER_STEP}
COSTS = {"player_flops": 1000, "critic_flops": 100, "cached_critic_flops": 10}

# --- CSV --------------------------------------------------------------------------------------------------------------


def rows_in(path: Path) -> list[dict]:
    """The rows of a CSV file, with None for what is empty."""
    rows = read_rows(path).astype(object)
    return rows.where(rows.notna(), None).to_dict("records")


def test_rows_read_back_are_those_that_were_written(tmp_path: Path):
    columns = ("arm", "seed", "optim.name", "device", "large", "fraction", "lost", "absent")
    rows = [
        dict(zip(columns, ("a", 1, 'x, "y"\nz', "1", 10**17 + 1, 0.1, math.nan, None), strict=True)),
        dict(zip(columns, ("1e5", 0, "muon", "None", -3, math.inf, math.nan, None), strict=True)),
    ]
    write_rows(tmp_path / "rows.csv", columns, [{**row, "not a column": 1} for row in rows])
    assert rows_in(tmp_path / "rows.csv") == [row | {"lost": None} for row in rows]
    write_rows(tmp_path / "again.csv", columns, rows_in(tmp_path / "rows.csv"))
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "rows.csv").read_bytes()


def test_eight_digits_are_kept(tmp_path: Path):
    write_rows(tmp_path / "rows.csv", ("arm", "x"), [{"arm": "a", "x": math.pi}])
    (row,) = rows_in(tmp_path / "rows.csv")
    assert row["x"] == pytest.approx(math.pi, rel=1e-7)
    write_rows(tmp_path / "none.csv", ("arm", "x"), [])
    assert rows_in(tmp_path / "none.csv") == []


def test_a_point_that_gave_up_stays_one(tmp_path: Path):
    grid = {"optim.learning_rate": [0.1, 0.2], "optim.name": ["adamw", "muon"]}
    tuned = [Tuned("a", (0.1, "muon"), 3.5, True), Tuned("a", (0.2, "muon"), math.inf, False)]
    write_rows(tmp_path / "tuning.csv", ("arm", *grid, "cross_entropy", "is_chosen"), tuning_rows(tuned, grid))
    assert rows_in(tmp_path / "tuning.csv") == [
        {"arm": "a", "optim.learning_rate": 0.1, "optim.name": "muon", "cross_entropy": 3.5, "is_chosen": 1},
        {"arm": "a", "optim.learning_rate": 0.2, "optim.name": "muon", "cross_entropy": math.inf, "is_chosen": 0},
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; a comparison's folder or its CSV files are expected"),
        (b"seed,cross_entropy\n1,2\n", "has no column arm"),
        (b"arm,seed\na,1,2\n", "has lines longer than its header"),
        (b"arm,seed\na,1\nb,1,2\n", "cannot be read"),
        (b"arm,seed\n\xff,1\n", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_what_no_comparison_writes_is_refused(tmp_path: Path, content: bytes | None, message: str):
    if content is not None:
        (tmp_path / "results.csv").write_bytes(content)
    with pytest.raises(UserError, match=f"results.csv.*{message}"):
        read_rows(tmp_path / "results.csv")


# --- seconds and FLOPs ------------------------------------------------------------------------------------------------


def test_seconds_are_those_of_the_lines_until_then():
    """100 tokens in 10 s, 200 in 2 s, 50 in 1 s."""
    lines = pd.DataFrame({"tokens": [100, 300, 350], "tokens_per_second": [10.0, 100.0, 50.0]})
    assert list(seconds_until(lines, [0, 50, 100, 200, 300, 350, 999])) == pytest.approx([0, 5, 10, 11, 12, 13, 13])
    assert seconds_until(lines[:0], 5) == 0


def member_of(folder: Path, critic: str | list[str] | None, own: dict[str, str | list[str] | None]) -> Member:
    """A run that names ``critic``, and its comparison's critics with those that each of them names."""
    for name, names in own.items():
        write_run(folder / "critics" / name, [], {"sizes": COSTS}, critic=names)
    run = write_run(folder / "runs" / "a" / "seed-1", [], {"sizes": {**COSTS, "cached_critic_flops": 7}}, critic=critic)
    return Member("a", 1, run, tuple(folder / "critics" / name for name in own))


@pytest.mark.parametrize(
    ("critic", "own", "training"),
    [
        (None, {}, 0),
        ("ema:0.99", {}, 0),
        (["random:3", "ema:0.9"], {}, 0),
        ("OUT/critics/one", {"one": None}, 1110),
        ("OUT/caches/one", {"one": None}, 1110),
        (["OUT/caches/one", "OUT/critics/two", "ema:0.9"], {"one": None, "two": None}, 2220),
        ("OUT/critics/one", {"one": "OUT/caches/two", "two": None}, 2220),  # what taught a critic is paid for too
        ("elsewhere/model", {}, None),
        (["OUT/critics/one", "elsewhere/model"], {"one": None}, None),
        (["OUT/critics/one", "elsewhere/model"], {"one": "OUT/critics/two", "two": None}, None),
        ("OUT/critics/one", {"one": "elsewhere/model"}, None),
    ],
)
def test_critics_are_charged_with_their_training(tmp_path: Path, critic, own: dict, training: float | None):
    def placed(names):
        if isinstance(names, list):
            return [placed(name) for name in names]
        return names and names.replace("OUT", str(tmp_path))

    member = member_of(tmp_path, placed(critic), {name: placed(names) for name, names in own.items()})
    assert spent_before(member) == (7, training)


def test_a_record_without_sizes_is_said(tmp_path: Path):
    run = write_run(tmp_path / "run", [], {"sizes": 5})
    with pytest.raises(UserError, match="environment.json is missing or damaged"):
        spent_before(Member("a", 1, run, ()))


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_real_run_fills_every_column(tmp_path: Path, tiny_config, data_folder: Path):
    config = tiny_config(tmp_path)
    train(config, quiet=True)
    member = Member("article", 3, Path(config.out), ())
    comparison = ComparisonConfig(arms={"article": {}}, out=str(tmp_path / "out"), baseline="article")
    row = result_row(member, comparison, PreparedData.open(data_folder), tmp_path / "out", "cpu")
    assert row.keys() == set(RESULT)
    absent = {"minimal_pairs_accuracy", "critic_training_flops", "tuned_as", "tuned_settings"}
    assert {name for name in RESULT if row[name] is None} - {"revision"} == absent  # which an installed package has not
    record = json.loads((member.folder / "environment.json").read_text())
    assert (row["precision"], row["revision"], row["torch"]) == ("fp32", record["revision"], torch.__version__)
    found = evaluate(member.folder, data_folder, device="cpu")
    for name in ("cross_entropy", "bits_per_byte", "top16_accuracy", "top16_calibration_error"):
        assert row[name] == found[name]

    lines = [json.loads(text) for text in (member.folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if line["event"] == "eval"]
    training = [line for line in lines if line["event"] == "train"]
    assert (row["arm"], row["seed"], row["objective"], row["tokens"]) == ("article", 3, "avatarl", 8 * 4 * 16)
    assert row["best_cross_entropy"] == min(line["cross_entropy"] for line in evaluations)
    assert row["final_cross_entropy"] == evaluations[-1]["cross_entropy"]
    assert row["other_reward_share"] == evaluations[-1]["other_reward_share"]
    assert (row["player_flops"], row["critic_flops"]) == tuple(
        training[-1][name] for name in ("player_flops", "critic_flops")
    )
    assert row["seconds"] == pytest.approx(sum(2 * 4 * 16 / line["tokens_per_second"] for line in training))

    rows = curve_rows(member)
    assert all(tuple(row) == CURVE for row in rows)
    assert [(row["step"], row["cross_entropy"]) for row in rows] == [
        (line["step"], line["cross_entropy"]) for line in evaluations
    ]
    assert [row["flops"] for row in rows] == [line["player_flops"] + line["critic_flops"] for line in evaluations]
    assert {row["all_flops"] for row in rows} == {None}  # its critic was made elsewhere
    assert 0 < rows[0]["seconds"] < rows[-1]["seconds"] == pytest.approx(row["seconds"])


def test_caches_and_training_count_from_the_start(tmp_path: Path):
    write_run(tmp_path / "critics" / "one", [], {"sizes": COSTS})
    run = write_run(
        tmp_path / "runs" / "a", made_up_lines(5), {"sizes": COSTS}, critic=str(tmp_path / "caches" / "one")
    )
    first, *_ = curve_rows(Member("a", 1, run, (tmp_path / "critics" / "one",)))
    assert first["flops"] == TOKENS_PER_STEP * 7_000_000 + 10
    assert first["all_flops"] == first["flops"] + 1110


def test_a_row_says_how_the_arm_was_tuned_and_what_it_ran_on(tmp_path: Path, monkeypatch):
    kept = Kept(tmp_path, monkeypatch, optim={"learning_rate": 0.03, "name": "muon"})
    grid = {"optim.learning_rate": [0.01, 0.03], "optim.name": ["adamw", "muon"], "player.settings": [{"a": 1}, None]}
    arms = {"b": {}, "a": {"tuned_as": "b"}, "c": None}
    comparison = ComparisonConfig(
        arms=arms, out=str(kept.out), baseline="a", tuning=TuningConfig(grid=grid, seed=9, arms=["b"])
    )
    found = {}
    for arm in arms:
        row = result_row(Member(arm, 1, kept.run, ()), comparison, kept.data, kept.out, "cpu")
        found[arm] = (row["tuned_as"], row["tuned_settings"])
        assert (row["precision"], row["revision"], row["torch"]) == ("bf16", "1234567, 89e1", "2.13.0")
    settings = "optim.learning_rate=0.03; optim.name=muon; player.settings="
    assert found == {"b": ("b", settings), "a": ("b", settings), "c": (None, settings)}


def test_words_that_look_like_numbers_stay_words(tmp_path: Path):
    row = dict.fromkeys(WORDS, "12e3")
    write_rows(tmp_path / "results.csv", RESULT, [row])
    assert {name: rows_in(tmp_path / "results.csv")[0][name] for name in WORDS} == row


class Kept:
    """A run with a player that nobody can open, how often it was evaluated, and what was changed since."""

    def __init__(self, folder: Path, monkeypatch, **settings):
        self.evaluated = self.scored = 0
        self.out, self.pairs = folder / "out", folder / "pairs.jsonl"
        first = {"precision": "bf16", "revision": "1234567", "versions": {"torch": "2.13.0"}}
        record = {"sizes": {**SIZES, **COSTS}, **first, "resumed": [{**first, "revision": "89e1"}]}
        self.run = write_run(folder / "run", made_up_lines(5), record, **settings)
        (self.run / "player").mkdir()
        self.data = SimpleNamespace(digest="d", path=folder)
        self.change_player(b"weights")
        self.write_pairs("good")
        monkeypatch.setattr(measures, "evaluate", self._evaluate)
        monkeypatch.setattr(measures, "score_pairs", self._score)

    def _evaluate(self, *_, **__) -> dict:
        self.evaluated += 1
        return EVALUATION | {"cross_entropy": float(self.evaluated)}

    def _score(self, *_, **__) -> dict:
        self.scored += 1
        return {"accuracy": 0.75}

    def change_player(self, content: bytes) -> None:
        (self.run / "player" / "model.safetensors").write_bytes(content)

    def write_pairs(self, good: str) -> None:
        self.pairs.write_text(json.dumps({"good": good, "bad": "bad"}) + "\n")

    def row(self, pairs: bool = False) -> dict:
        comparison = ComparisonConfig(
            arms={"a": {}}, out=str(self.out), baseline="a", pairs=str(self.pairs) if pairs else None
        )
        return result_row(Member("a", 1, self.run, ()), comparison, self.data, self.out, "cpu")


def test_an_evaluation_is_kept_while_nothing_changes(tmp_path: Path, monkeypatch):
    kept = Kept(tmp_path, monkeypatch)
    assert kept.row() == kept.row()
    assert kept.evaluated == 1 and [path.name for path in (kept.out / "evaluations").iterdir()] == ["a-seed-1.json"]
    kept.change_player(b"others")
    assert kept.row()["cross_entropy"] == 2.0
    kept.data.digest = "another"
    assert kept.row()["cross_entropy"] == 3.0
    assert kept.scored == 0
    assert kept.row(pairs=True)["minimal_pairs_accuracy"] == 0.75
    assert kept.row(pairs=True)["cross_entropy"] == 4.0
    kept.write_pairs("better")  # other pairs in the same file
    assert kept.row(pairs=True)["cross_entropy"] == 5.0
    assert (kept.evaluated, kept.scored) == (5, 2)
    assert kept.row()["minimal_pairs_accuracy"] is None


def test_a_damaged_evaluation_is_named(tmp_path: Path, monkeypatch):
    kept = Kept(tmp_path, monkeypatch)
    kept.row()
    (kept.out / "evaluations" / "a-seed-1.json").write_text("{")
    with pytest.raises(UserError, match="a-seed-1.json cannot be read .*; remove it"):
        kept.row()
