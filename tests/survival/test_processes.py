"""Two processes: one that is killed takes the other along, torchrun starts both again, and the weights are the same."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from .harness import Attempt, Job, Launcher, differences, last_step, newest_step

pytestmark = pytest.mark.slow

KILLS = 20
PROCESSES = 2


def torchrun(launcher: Launcher, job: Job, run: Path, max_restarts: int) -> Attempt:
    """The run on two processes, which torchrun starts again so many times."""
    options = ["--standalone", f"--nproc_per_node={PROCESSES}", f"--max_restarts={max_restarts}"]
    return launcher.run_command(
        ["-m", "torch.distributed.run", *options, "-m", "avatarl", *job.arguments(run)],
    )


def ranks(attempt: Attempt) -> list[int]:
    """The process ids of the ranks: torchrun's children that run the command."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            command = (status.parent / "cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):  # it ended while we looked
            continue
        if parent == attempt.pid and b"avatarl" in command:
            found.append(int(status.parent.name))
    return sorted(found)


def end(attempt: Attempt) -> None:
    """Kill torchrun and its ranks, which lead sessions of their own."""
    for pid in [*ranks(attempt), attempt.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


@pytest.fixture(scope="module")
def long_job(job: Job) -> Job:
    """A run that outlives ten kills, each of which costs two processes their start."""
    return job.but(steps=1000, checkpoint_every_steps=20, eval_every_steps=200, log_every_steps=5)


@pytest.fixture(scope="module")
def peaceful(launcher: Launcher, long_job: Job, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The uninterrupted run of two processes, and how many seconds it takes after its first steps."""
    run = tmp_path_factory.mktemp("peaceful") / "run"
    attempt = torchrun(launcher, long_job, run, max_restarts=0)
    assert attempt.wait_for(lambda: last_step(run)), attempt.errors
    began = time.monotonic()
    assert attempt.wait(600) == 0, attempt.errors
    return run, time.monotonic() - began


def test_ranks_killed_at_random_are_started_again(
    launcher: Launcher, long_job: Job, peaceful: tuple[Path, float], tmp_path: Path
):
    rng, killed, runs = random.Random(1), 0, 0
    while killed < KILLS:
        runs += 1
        run = tmp_path / f"run-{runs}"
        in_this_run = min(10, KILLS - killed)
        attempt = torchrun(launcher, long_job, run, max_restarts=in_this_run)
        try:
            killed += kill_ranks(attempt, run, rng, in_this_run, peaceful[1])
            assert attempt.wait(600) == 0, attempt.errors[-3000:]
        finally:
            end(attempt)
        assert not differences(run, peaceful[0])
    print(f"{killed} ranks killed in {runs} runs")


def kill_ranks(attempt: Attempt, run: Path, rng: random.Random, kills: int, training_seconds: float) -> int:
    """Kill one rank of each generation, some while they start and most while they train; how many were killed."""
    seen: set[int] = set()
    for done in range(kills):
        newest = newest_step(run) or 0
        if not attempt.wait_for(lambda seen=seen: len(set(ranks(attempt)) - seen) == PROCESSES, pause=0.1):
            return done  # it has finished
        generation = sorted(set(ranks(attempt)) - seen)
        seen |= set(generation)
        if rng.random() < 0.25:
            attempt.wait_for(lambda: False, rng.uniform(0, 8))
        else:
            attempt.wait_for(lambda newest=newest: last_step(run) > newest + 10, pause=0.05)
            attempt.wait_for(lambda: False, rng.uniform(0, 2 * training_seconds / kills), pause=0.05)
        if attempt.poll() is not None:
            return done
        try:
            os.kill(rng.choice(generation), signal.SIGKILL)
        except ProcessLookupError:
            return done
        assert (newest_step(run) or 0) >= newest
    return kills


def test_without_restarts_a_killed_rank_takes_the_run_down(launcher: Launcher, long_job: Job, tmp_path: Path):
    run = tmp_path / "run"
    attempt = torchrun(launcher, long_job, run, max_restarts=0)
    try:
        assert attempt.wait_for(lambda: (newest_step(run) or 0) > 0), attempt.errors
        victims = ranks(attempt)
        os.kill(victims[-1], signal.SIGKILL)
        assert attempt.wait(60) not in (0, None)
        assert not ranks(attempt)
        assert "SIGKILL" in attempt.errors or "Signal 9" in attempt.errors, attempt.errors
    finally:
        end(attempt)
