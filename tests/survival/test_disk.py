"""A disk that is full, read-only or gone ends a run with one clear line, and a later resume ends with the same weights.

These tests mount small file systems in memory, and are skipped where that is not allowed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .harness import Attempt, Job, Launcher, checkpoints, differences, newest_step
from .kill import Twin

BIG = "16m"


class Disk:
    """A file system in memory, seen at ``place`` through a second mount that can be taken away."""

    def __init__(self, folder: Path):
        self._store, self.place = folder / "store", folder / "disk"
        self._store.mkdir()
        self.place.mkdir()
        mount("-t", "tmpfs", "-o", f"size={BIG}", "tmpfs", str(self._store))
        (self._store / "root").mkdir()
        self._bound = 0
        self.attach()

    def attach(self, *options: str) -> None:
        """Mount the store at ``place``, over what may be mounted there already."""
        mount("--bind", str(self._store / "root"), str(self.place))
        self._bound += 1
        if options:
            mount("-o", ",".join(["remount", "bind", *options]), str(self.place))

    def detach(self) -> None:
        """Take the newest mount at ``place`` away, even if files of it are open."""
        subprocess.run(["umount", "--lazy", str(self.place)], check=True)
        self._bound -= 1

    def fill(self, leave: int = 0) -> None:
        """Leave no more than so many bytes free, also while others write."""
        with (self._store / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
            while (free := shutil.disk_usage(self._store).free) > leave:
                ballast.write(bytes(free - leave))

    def make_space(self) -> None:
        (self._store / "ballast").unlink()

    def close(self) -> None:
        while self._bound:
            self.detach()
        subprocess.run(["umount", "--lazy", str(self._store)], check=True)


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """An empty disk of 16 MB."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a disk needs Linux and root")
    try:
        disk = Disk(tmp_path)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting is not allowed here: {error}")
    try:
        yield disk
    finally:
        disk.close()


def check_end(attempt: Attempt, run: Path, reason: str) -> None:
    """It ended by itself with status 1 and said where and why in its last line."""
    assert attempt.wait() == 1, attempt.errors
    last = attempt.errors.splitlines()[-1]
    assert last.startswith("avatarl: ") and str(run) in last and reason in last, attempt.errors
    assert "Traceback" not in attempt.errors and "Exception ignored" not in attempt.errors, attempt.errors


def check_resumed(launcher: Launcher, job: Job, twin: Twin, run: Path) -> None:
    resumed = launcher.fork(job.arguments(run))
    assert resumed.wait() == 0, resumed.errors
    assert "damaged" not in resumed.errors, resumed.errors
    assert not differences(run, twin.run)


def wait_for_step(attempt: Attempt, run: Path, step: int) -> None:
    assert attempt.wait_for(lambda: (newest_step(run) or 0) >= step), attempt.errors


def contents(folders: list[Path]) -> dict[str, bytes]:
    """What lies in checkpoints, by the names of folder and file."""
    return {
        f"{folder.name}/{path.relative_to(folder)}": path.read_bytes()
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file()
    }


def stop_in_the_middle(launcher: Launcher, job: Job, run: Path) -> Path:
    """Train up to some step in the middle, and leave nothing unfinished that could be cleared away to make space."""
    attempt = launcher.fork(job.arguments(run))
    wait_for_step(attempt, run, 12)
    attempt.send(signal.SIGTERM)
    attempt.wait()
    assert newest_step(run) < job.settings["steps"] and len(checkpoints(run)) == job.settings["keep_last"]
    return run


@pytest.mark.parametrize(
    "share_of_a_checkpoint",
    [0.5, *(pytest.param(share, marks=pytest.mark.slow) for share in (0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9))],
)
def test_a_full_disk_ends_the_run_and_space_saves_it(
    launcher: Launcher, job: Job, twin: Twin, disk: Disk, share_of_a_checkpoint: float
):
    run = stop_in_the_middle(launcher, job, disk.place / "run")
    before = contents(checkpoints(run))
    size = sum(path.stat().st_size for path in checkpoints(run)[-1].iterdir())
    disk.fill(leave=int(share_of_a_checkpoint * size))
    attempt = launcher.fork(job.arguments(run))
    check_end(attempt, run, "No space left on device")
    after = contents(checkpoints(run))
    assert {name for name in before if name not in after} == set()  # nothing goes before something new is whole
    assert all(after[name] == before[name] for name in before)
    disk.make_space()
    check_resumed(launcher, job, twin, run)


def test_a_disk_that_fills_up_in_the_middle(launcher: Launcher, job: Job, twin: Twin, disk: Disk):
    run = disk.place / "run"
    attempt = launcher.fork(job.arguments(run))
    wait_for_step(attempt, run, 15)
    disk.fill()
    newest = newest_step(run)
    check_end(attempt, run, "No space left on device")
    assert newest_step(run) >= newest
    disk.make_space()
    check_resumed(launcher, job, twin, run)


@pytest.mark.slow
def test_a_disk_that_is_full_from_the_start(launcher: Launcher, job: Job, twin: Twin, disk: Disk):
    disk.fill()
    run = disk.place / "run"
    check_end(launcher.fork(job.arguments(run)), run, "No space left on device")
    disk.make_space()
    check_resumed(launcher, job, twin, run)


def test_a_disk_that_becomes_read_only(launcher: Launcher, job: Job, twin: Twin, disk: Disk):
    run = disk.place / "run"
    attempt = launcher.fork(job.arguments(run))
    wait_for_step(attempt, run, 15)
    disk.attach("ro")  # open files can still be written, as a mount that has them cannot be made read-only
    before = contents(checkpoints(run))
    check_end(attempt, run, "Read-only file system")
    after = contents(checkpoints(run))
    assert all(after[name] == before[name] for name in before)
    again = launcher.fork(job.arguments(run))
    check_end(again, run, "Read-only file system")
    disk.detach()
    check_resumed(launcher, job, twin, run)


def test_a_disk_that_vanishes(launcher: Launcher, job: Job, twin: Twin, disk: Disk):
    run = disk.place / "run"
    attempt = launcher.fork(job.arguments(run))
    wait_for_step(attempt, run, 15)
    disk.detach()
    check_end(attempt, run, "")
    assert not list(disk.place.iterdir())  # nothing was written beneath, where no one would look for it
    disk.attach()
    check_resumed(launcher, job, twin, run)
