"""What a run wrote, read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from avatarl import UserError
from avatarl.results import read_metrics
from avatarl.results.runs import distinct_names, read_columns
from avatarl.training import train

from .reports import line, write_run


def made_up_run(folder: Path, offset: float) -> Path:
    lines = []
    for step in (1, 2, 3):
        common = {"step": step, "tokens": step * 1000}
        lines.append({"event": "train", **common, "loss": offset + step, "expected_reward_share": 0.1 * step})
        lines.append({"event": "eval", **common, "cross_entropy": offset - step})
    return write_run(folder, lines)


# --- metrics --------------------------------------------------------------------------------------------------------


def test_the_lines_of_a_run_read_back_by_event(tiny_config, tmp_path: Path):
    summary = train(tiny_config(tmp_path), quiet=True)
    training, evaluations = (read_metrics(tmp_path / "run", event) for event in ("train", "eval"))
    assert [line["step"] for line in training] == [2, 4, 6, 8]
    assert [line["step"] for line in evaluations] == [4, 8]
    assert all(line["event"] == "train" and "loss" in line for line in training)
    assert min(line["cross_entropy"] for line in evaluations) == summary["best_cross_entropy"]
    assert read_metrics(tmp_path / "run", "nothing of this name") == []


@pytest.mark.parametrize(
    "content",
    [b'{"event": "eval", "st', b"hello\n", b"5\n", b"[]\n", b'{"step": 1}\n', b"\xff\xfe\n", b"null\n"],
    ids=["torn", "text", "number", "list", "no event", "not UTF-8", "null"],
)
def test_a_line_that_no_run_writes_is_refused_by_its_number(tmp_path: Path, content: bytes):
    run = made_up_run(tmp_path / "run", 5.0)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(content)
    with pytest.raises(UserError, match="metrics.jsonl, line 7, is not a line of metrics"):
        read_metrics(run, "eval")


def test_a_folder_without_metrics_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="has no metrics.jsonl that is a regular file; expected a run folder"):
        read_metrics(tmp_path, "train")
    with pytest.raises(UserError, match="nowhere has no metrics.jsonl"):
        read_metrics(tmp_path / "nowhere", "train")


def test_an_empty_file_has_no_lines(tmp_path: Path):
    assert read_metrics(write_run(tmp_path / "run", []), "train") == []


def test_names_are_the_ends_of_paths_that_differ():
    assert distinct_names(["a/run", "b/run", "c/other"]) == ["a/run", "b/run", "other"]
    assert distinct_names(["x/a/run", "y/a/run"]) == ["x/a/run", "y/a/run"]
    with pytest.raises(UserError, match="is given twice"):
        distinct_names(["a/run", "a/../a/run"])


def test_what_is_no_number_is_told_from_what_is_missing(tmp_path: Path):
    run = write_run(tmp_path / "run", [line("train", 1, loss=float("nan")), line("train", 2), line("train", 3, loss=1)])
    columns, _ = read_columns(run, ["loss"])
    np.testing.assert_array_equal(columns["loss"], [np.inf, np.nan, 1])


def test_a_torn_line_is_forgiven_at_the_end_only(tmp_path: Path):
    run = write_run(tmp_path / "run", [line("train", 1, loss=1.0)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "tr')
    columns, _ = read_columns(run, ["loss"])
    assert columns["loss"].tolist() == [1.0]
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(UserError, match="line 2"):
        read_columns(run, ["loss"])
