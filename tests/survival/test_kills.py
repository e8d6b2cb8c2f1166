"""A run that is killed at any moment, any number of times, ends with the same weights, metrics and files."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from .harness import Job, Launcher, differences
from .kill import Killer, Twin, jobs, kill_runs, table


def test_a_run_killed_six_times_ends_as_if_nothing_had_happened(
    launcher: Launcher, job: Job, twin: Twin, tmp_path: Path
):
    killer = Killer(launcher, random.Random(1), kills=6, final_kills=1)
    story = killer.run(job, twin, tmp_path / "run")
    assert not story.problems
    assert len(story.kills) >= 4
    assert any(kill.is_aimed for kill in story.kills) and not all(kill.is_aimed for kill in story.kills)


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_every_single_call_of_one_checkpoint(launcher: Launcher, job: Job, twin: Twin, tmp_path: Path, after: bool):
    calls = [call for call in twin.calls if "/checkpoints" in call]
    removals = [index for index, call in enumerate(calls) if call.startswith("rmdir")]
    for number in range(removals[1] + 2, removals[2] + 2):  # from one removal of a checkpoint to the next
        run = tmp_path / f"run-{number}"
        slow = launcher.slow_call(run, number, after, only="checkpoints")
        attempt = launcher.fork(job.arguments(run), slow)
        assert attempt.wait_for(slow.marker.exists), attempt.errors
        attempt.kill()
        resumed = launcher.fork(job.arguments(run))
        assert resumed.wait() == 0, resumed.errors
        assert "damaged" not in resumed.errors, calls[number - 1]
        assert not differences(run, twin.run), calls[number - 1]


def test_the_comparison_sees_every_kind_of_difference(twin: Twin, copy_of):
    run = copy_of(twin.run)
    assert not differences(run, twin.run)
    (run / "left.partial").touch()
    (run / "left").mkdir()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([*lines, lines[-1]]))
    weights = bytearray((run / "final" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (run / "final" / "model.safetensors").write_bytes(weights)
    (run / "player" / "model.safetensors").unlink()
    assert differences(run, twin.run) == [
        "left.partial is left over",
        "player/model.safetensors is missing",
        "left is an empty folder",
        "final/model.safetensors differs",
        "metrics.jsonl differs",
        "player/model.safetensors was never written",
    ]


@pytest.mark.slow
def test_two_hundred_kills(launcher: Launcher, data_folder: Path, tmp_path: Path, capsys):
    kinds = jobs(data_folder, steps=300)
    stories = kill_runs(launcher, kinds, tmp_path, kills=200, kills_per_run=25, seed=1, executed_share=0.05)
    with capsys.disabled():
        print("\n" + table(stories, sum(story.seconds for story in stories)))
    assert not [problem for story in stories for problem in story.problems]
    assert len(stories) >= 5
