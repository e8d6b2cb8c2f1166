"""What a run wrote, read back; and its curves as a picture."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import pytest

from avatarl import UserError
from avatarl.results import draw_curves, read_metrics
from avatarl.training import train

PNG = b"\x89PNG\r\n\x1a\n"


def write_run(folder: Path, lines: list[dict]) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


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


# --- curves ---------------------------------------------------------------------------------------------------------


def test_a_picture_is_drawn(tmp_path: Path):
    runs = {"one": made_up_run(tmp_path / "a", 5.0), "two": made_up_run(tmp_path / "b", 6.0)}
    draw_curves(runs, tmp_path / "curves.png", {"unigram entropy": 4.0})
    content = (tmp_path / "curves.png").read_bytes()
    assert content.startswith(PNG)
    empty = {"none": write_run(tmp_path / "c", [])}
    draw_curves(empty, tmp_path / "empty.png")
    assert len(content) > 1.2 * len((tmp_path / "empty.png").read_bytes())


def test_the_picture_names_every_run_and_baseline(tmp_path: Path):
    """SVG writes each text beside its shape as a comment; six runs are more than there are colours."""
    names = ["first", "second", "third", "fourth", "fifth", "sixth"]
    runs = {name: made_up_run(tmp_path / name, 5.0 + number) for number, name in enumerate(names)}
    draw_curves(runs, tmp_path / "curves.svg", {"unigram entropy": 4.0})
    picture = (tmp_path / "curves.svg").read_text()
    # Validation, training loss and expected reward; no run has the fourth panel's metric.
    assert {name: picture.count(f"<!-- {name} -->") for name in names} == dict.fromkeys(names, 3)
    assert picture.count("<!-- unigram entropy -->") == 1
    assert "<!-- validation cross-entropy (nats per token) -->" in picture


def test_the_callers_backend_is_left_alone(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "backend", "svg")
    draw_curves({"run": made_up_run(tmp_path / "run", 5.0)}, tmp_path / "curves.png")
    assert matplotlib.rcParams["backend"] == "svg"
