"""What was read and spent is kept in checkpoints, whatever settings the steps before had."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file

from avatarl.comparison.measures import sizes_of
from avatarl.data import PreparedData, WindowOrder, Windows
from avatarl.errors import RunFailed
from avatarl.results.runs import read_runs
from avatarl.results.tables import overview_table, what_was_trained
from avatarl.training import GuardConfig, Schedule, ScheduleConfig, TrainConfig, loop, train
from avatarl.training.guard import Guard
from avatarl.training.schedule import Stage
from avatarl.training.setup import Setup
from avatarl.training.state import Progress

from ..conftest import BLOCK
from .runs import SPENT, Interrupted, lines_of

FIRST = dict(log_every_steps=3, checkpoint_every_steps=4, eval_every_steps=2)


@pytest.fixture
def places(monkeypatch) -> dict[int, range]:
    """The places in the data's order that each step has read, as it was last taken."""
    read, real = {}, loop.train_step

    def train_step(setup: Setup, stage: Stage, progress: Progress) -> float:
        first = progress.windows
        rate = real(setup, stage, progress)
        read[progress.step] = range(first, progress.windows)
        return rate

    monkeypatch.setattr(loop, "train_step", train_step)
    return read


@pytest.fixture
def stop(interrupt):
    """Train by a configuration until two steps after the checkpoint of step 4."""

    def until_6(config: TrainConfig) -> None:
        interrupt(7)
        with pytest.raises(Interrupted):
            train(config, quiet=True)

    return until_6


def costs(tiny_config, folder: Path, **settings) -> list[int]:
    """What a token costs under these settings: FLOPs of the player, and of critics."""
    summary = train(tiny_config(folder, steps=1, **settings), quiet=True)
    return [summary[name] // summary["tokens"] for name in SPENT[1:]]


@pytest.mark.parametrize(
    "changes",
    [
        dict(micro_batch_size=2),
        dict(micro_batch_size=6, gradient_accumulation_steps=2),
        dict(block_size=BLOCK // 2),
        dict(objective="cross_entropy"),
        dict(critic="random:1m:3"),
        dict(critic="CACHE"),
    ],
    ids=lambda changes: " ".join(changes),
)
def test_steps_before_a_change_are_counted_as_they_were(
    tiny_config, tmp_path: Path, critic_cache: Path, places, stop, changes: dict
):
    if changes.get("critic") == "CACHE":
        changes = {"critic": str(critic_cache)}
    stop(tiny_config(tmp_path, **FIRST))
    after = FIRST | changes
    summary = train(tiny_config(tmp_path, **after), resume=True, allow_changes=True, quiet=True)

    block_size, windows = (
        after.get("block_size", BLOCK),
        after.get("micro_batch_size", 4) * after.get("gradient_accumulation_steps", 1),
    )
    assert [places[step] for step in (1, 4)] == [range(4), range(12, 16)]
    # Nothing is read again, and nothing left out.
    assert [places[step] for step in (5, 8)] == [range(16 + i * windows, 16 + (i + 1) * windows) for i in (0, 3)]
    before, now = (costs(tiny_config, tmp_path / name, **of) for name, of in (("before", FIRST), ("now", after)))
    for line in lines_of(tmp_path / "run"):
        tokens = [min(line["step"], 4) * 4 * BLOCK, max(line["step"] - 4, 0) * windows * block_size]
        assert line["tokens"] == sum(tokens)
        for name, *each in zip(SPENT[1:], before, now, strict=True):
            assert line[name] == sum(count * cost for count, cost in zip(tokens, each, strict=True)), name
    assert {name: summary[name] for name in SPENT} == {name: line[name] for name in SPENT}
    assert {name: sizes_of(tmp_path / "run")[name] for name in SPENT} == {name: line[name] for name in SPENT}


def test_two_changes_on_the_way(tiny_config, tmp_path: Path, places, stop, interrupt):
    """The second one before the first checkpoint after the first, so that nothing is left of that."""
    stop(tiny_config(tmp_path, **FIRST))
    interrupt(2)
    with pytest.raises(Interrupted):
        train(tiny_config(tmp_path, micro_batch_size=9, **FIRST), resume=True, allow_changes=True, quiet=True)
    settings = FIRST | dict(micro_batch_size=2, steps=12)
    interrupt(6)
    with pytest.raises(Interrupted):
        train(tiny_config(tmp_path, **settings), resume=True, allow_changes=True, quiet=True)
    train(tiny_config(tmp_path, **settings | dict(micro_batch_size=5)), resume=True, allow_changes=True, quiet=True)
    assert [places[step] for step in (4, 5, 8, 9, 12)] == [
        range(*ends) for ends in ((12, 16), (16, 18), (22, 24), (24, 29), (39, 44))
    ]
    assert lines_of(tmp_path / "run")[-1]["tokens"] == 44 * BLOCK


def test_critics_that_schedules_let_go_before_a_change(tiny_config, tmp_path: Path, stop):
    """Two steps with the critic before the change, two with it after."""
    first, later = (ScheduleConfig(critic_weight=Schedule("first", end_step=end)) for end in (2, 6))
    stop(tiny_config(tmp_path, schedules=first, **FIRST))
    train(tiny_config(tmp_path, schedules=later, **FIRST), resume=True, allow_changes=True, quiet=True)
    _, each = costs(tiny_config, tmp_path / "one")
    assert lines_of(tmp_path / "run")[-1]["critic_flops"] == 4 * 4 * BLOCK * each


def test_caches_that_were_asked_before_a_change_are_paid_for(tiny_config, tmp_path: Path, critic_cache: Path, stop):
    config = tiny_config(tmp_path, critic=str(critic_cache), **FIRST)
    stop(config)
    took = sizes_of(tmp_path / "run")["cached_critic_flops"]
    summary = train(tiny_config(tmp_path, **FIRST), resume=True, allow_changes=True, quiet=True)
    assert summary["cached_critic_flops"] == took > 0
    (run,) = read_runs([tmp_path / "run"], (*SPENT[1:], "cross_entropy", "tokens_per_second"))
    rows = overview_table([run], [what_was_trained(run, None)]).sections[0][1]
    shown = next(row for row in rows if row.name == "FLOPs of critics' caches, once").cells[0].text
    assert float(shown.replace(",", "")) > 0


@pytest.mark.parametrize("micro_batch_size, steps", [(2, 4 + 16), (8, 4 + 4), (4, 12)])
def test_epochs_are_of_what_was_read(tiny_config, tmp_path: Path, monkeypatch, stop, micro_batch_size: int, steps: int):
    """Two of 24 windows; sixteen of them were read in four steps."""
    settings = dict(epochs=2.0, train_windows=24, eval_every_steps=100, checkpoint_every_steps=4)
    stop(tiny_config(tmp_path, **settings | dict(steps=None)))
    read, real = Counter(), Windows.batch

    def batch(self: Windows, indices):
        if len(self) == 24:
            read.update(map(int, indices))
        return real(self, indices)

    monkeypatch.setattr(Windows, "batch", batch)
    config = tiny_config(tmp_path, **settings | dict(steps=None, micro_batch_size=micro_batch_size))
    summary = train(config, resume=True, allow_changes=True, quiet=True)
    assert (summary["steps"], summary["tokens"]) == (steps, 48 * BLOCK)
    read.update(WindowOrder(24, config.seed).indices(0, 16).tolist())
    assert read == Counter(dict.fromkeys(range(24), 2))


def test_speed_is_of_the_tokens_that_were_read(tiny_config, tmp_path: Path, stop):
    """The line after the change is of a step of four windows and two of one, whose time is kept too."""
    stop(tiny_config(tmp_path, **FIRST))
    train(tiny_config(tmp_path, micro_batch_size=1, **FIRST), resume=True, allow_changes=True, quiet=True)
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert state["logged_tokens"] == 3 * 4 * BLOCK
    lines = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (line,) = (line for line in lines if line["event"] == "train" and line["step"] == 6)
    seconds = (1 * 4 + 2 * 1) * BLOCK / line["tokens_per_second"]
    assert state["unlogged_seconds"] < seconds < state["unlogged_seconds"] + 60
    assert line["tokens"] == (4 * 4 + 2) * BLOCK


def test_a_line_after_a_change_is_of_the_steps_after_it(tiny_config, tmp_path: Path, stop, interrupt):
    """Also where the changed run was interrupted before its first checkpoint."""
    settings = FIRST | dict(objective="cross_entropy", log_every_steps=6)
    stop(tiny_config(tmp_path, **FIRST | dict(log_every_steps=6)))
    interrupt(2)
    with pytest.raises(Interrupted):
        train(tiny_config(tmp_path, **settings), resume=True, allow_changes=True, quiet=True)
    train(tiny_config(tmp_path, **settings), resume=True, quiet=True)
    (line,) = (line for line in lines_of(tmp_path / "run") if line["event"] == "train" and line["step"] == 6)
    assert "expected_reward" not in line and line["loss"] == line["cross_entropy"]


def test_refused_windows_after_a_change_are_those_that_were_read(
    tiny_config, tmp_path: Path, data_folder: Path, monkeypatch, stop
):
    stop(tiny_config(tmp_path, **FIRST))
    real = Guard.check
    monkeypatch.setattr(Guard, "check", lambda self, step, loss, norm: real(self, step, loss * float("nan"), norm))
    config = tiny_config(tmp_path, micro_batch_size=2, guard=GuardConfig(stop_after=2), **FIRST)
    with pytest.raises(RunFailed, match="at step 6, 2 skipped"):
        train(config, resume=True, allow_changes=True, quiet=True)
    windows = Windows(PreparedData.open(data_folder).train, BLOCK)
    saved = load_file(tmp_path / "run" / "refused" / "windows.safetensors")
    expected = windows.batch(WindowOrder(len(windows), config.seed).indices(16, 4))[0]
    assert saved["step-00000005.inputs"].tolist() + saved["step-00000006.inputs"].tolist() == expected.tolist()
