"""A launcher for all tests, and a finished run to compare with."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .harness import Job, Launcher, newest_step, tiny_job
from .kill import Twin, run_twin


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """Starts training processes; those that still live at the end are killed."""
    if sys.platform != "linux":
        pytest.skip("forking a process that has imported torch is sound on Linux alone")
    with Launcher(tmp_path_factory.mktemp("launcher")) as launcher:
        yield launcher


@pytest.fixture(scope="session")
def job(data_folder: Path) -> Job:
    """Thirty steps in about a second, a checkpoint after every third."""
    return tiny_job(data_folder, keep_last=3)


@pytest.fixture(scope="session")
def twin(launcher: Launcher, job: Job, tmp_path_factory: pytest.TempPathFactory) -> Twin:
    """The job's run, from start to end in peace."""
    return run_twin(launcher, job, tmp_path_factory.mktemp("twin") / "run")


@pytest.fixture(scope="session")
def unfinished(launcher: Launcher, job: Job, twin: Twin, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed between its last checkpoint and the final player."""
    return kill_before_final(launcher, job, tmp_path_factory.mktemp("unfinished") / "run")


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """``copy_of(run)``: the run in a folder that a test may change."""

    def copy(run: Path) -> Path:
        return shutil.copytree(run, tmp_path / "run", symlinks=True)

    return copy


def kill_before_final(launcher: Launcher, job: Job, run: Path) -> Path:
    """Run ``job`` up to its last checkpoint and no further."""
    slow = launcher.slow_call(run, number=1, only="final")
    attempt = launcher.fork(job.arguments(run), slow)
    assert attempt.wait_for(slow.marker.exists), attempt.errors
    attempt.kill()
    assert newest_step(run) == job.settings["steps"] and not (run / "final").exists()
    return run
