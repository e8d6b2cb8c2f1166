"""Signals end a run soon and in order, a second one at once; two processes never share a run."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from .harness import Attempt, Job, Launcher, differences, last_step, metrics, newest_step
from .kill import Twin

SIGTERM_STATUS, SIGINT_STATUS = 143, 130


def check_resumed(launcher: Launcher, job: Job, twin: Twin, run: Path) -> None:
    resumed = launcher.fork(job.arguments(run))
    assert resumed.wait() == 0, resumed.errors
    assert not differences(run, twin.run)


def wait_for_step(attempt: Attempt, run: Path, step: int) -> None:
    assert attempt.wait_for(lambda: last_step(run) >= step), attempt.errors


def slow_writing(launcher: Launcher, job: Job, run: Path, seconds: float) -> Attempt:
    """A process that sleeps in the middle of writing one of its checkpoints."""
    slow = launcher.slow_call(run, 33, only="checkpoints", seconds=seconds)
    attempt = launcher.fork(job.arguments(run), slow)
    assert attempt.wait_for(slow.marker.exists), attempt.errors
    return attempt


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, SIGTERM_STATUS), (signal.SIGINT, SIGINT_STATUS)])
def test_a_signal_finishes_the_step_and_saves_it(
    launcher: Launcher, job: Job, twin: Twin, tmp_path: Path, number: signal.Signals, status: int
):
    run = tmp_path / "run"
    job = job.but(checkpoint_every_steps=1000, log_every_steps=1)
    attempt = launcher.fork(job.arguments(run))
    wait_for_step(attempt, run, 10)
    attempt.send(number)
    assert attempt.wait() == status, attempt.errors
    assert newest_step(run) == last_step(run) < job.settings["steps"]
    assert "Traceback" not in attempt.errors
    resumed = launcher.fork(job.arguments(run))
    assert resumed.wait() == 0, resumed.errors
    for name in ("final", "player"):
        weights = f"{name}/model.safetensors"
        assert (run / weights).read_bytes() == (twin.run / weights).read_bytes()


def test_signals_at_random_moments(launcher: Launcher, job: Job, twin: Twin, tmp_path: Path):
    rng, run = random.Random(3), tmp_path / "run"
    for _ in range(3):
        attempt = launcher.fork(job.arguments(run))
        attempt.wait_for(lambda: False, rng.uniform(0, 2 * twin.startup_seconds))
        attempt.send(signal.SIGTERM)
        # Before the command has begun, the system's own answer to the signal ends it.
        status = attempt.wait()
        assert status in (SIGTERM_STATUS, -signal.SIGTERM, 0), attempt.errors
        assert "Traceback" not in attempt.errors
        assert (newest_step(run) or 0) >= last_step(run) or status == -signal.SIGTERM
        if status == 0:
            break
    check_resumed(launcher, job, twin, run)


def test_a_signal_while_a_checkpoint_is_written(launcher: Launcher, job: Job, twin: Twin, tmp_path: Path):
    run = tmp_path / "run"
    attempt = slow_writing(launcher, job, run, seconds=0.5)
    before = newest_step(run)
    attempt.send(signal.SIGTERM)
    assert attempt.wait() == SIGTERM_STATUS, attempt.errors
    assert newest_step(run) > before
    check_resumed(launcher, job, twin, run)


def test_a_signal_during_evaluation(launcher: Launcher, job: Job, twin: Twin, tmp_path: Path):
    run, every = tmp_path / "run", job.settings["eval_every_steps"]
    attempt = launcher.fork(job.arguments(run))
    wait_for_step(attempt, run, every)  # its line comes just before the evaluation
    attempt.send(signal.SIGTERM)
    assert attempt.wait() == SIGTERM_STATUS, attempt.errors
    assert newest_step(run) >= every and "eval" in [line["event"] for line in metrics(run)]
    check_resumed(launcher, job, twin, run)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_second_signal_ends_it_at_once(
    launcher: Launcher, job: Job, twin: Twin, tmp_path: Path, number: signal.Signals
):
    run = tmp_path / "run"
    attempt = slow_writing(launcher, job, run, seconds=60)
    before = newest_step(run)
    attempt.send(number)
    time.sleep(0.2)
    assert attempt.poll() is None, attempt.errors
    sent = time.monotonic()
    attempt.send(number)
    status = attempt.wait()
    assert time.monotonic() - sent < 2
    assert status in (128 + number, -number), attempt.errors  # of its own, or by the kernel: the same to a shell
    assert "Traceback" not in attempt.errors
    assert newest_step(run) == before
    check_resumed(launcher, job, twin, run)


def test_a_second_process_is_refused_and_a_dead_one_is_no_hindrance(
    launcher: Launcher, job: Job, twin: Twin, tmp_path: Path
):
    run = tmp_path / "run"
    first = slow_writing(launcher, job, run, seconds=60)
    before = sorted(path for path in run.rglob("*"))
    second = launcher.fork(job.arguments(run))
    assert second.wait() == 2, second.errors
    assert len(second.errors.splitlines()) == 1 and str(first.pid) in second.errors, second.errors
    assert sorted(path for path in run.rglob("*")) == before
    assert first.kill() == -signal.SIGKILL
    check_resumed(launcher, job, twin, run)
