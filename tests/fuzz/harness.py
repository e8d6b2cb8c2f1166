"""One hostile input at a time: it works or is refused in one inert line; it writes, runs and fetches nothing.

Every case is decided by the name of its subject, a seed and its number, which the message of a failure names.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from avatarl import UserError
from avatarl.sanitise import LONGEST_LINE, OBEYED

SECONDS_PER_CASE = 20
# More address space than any case needs; where a library asks for terabytes, it is told no instead of the machine.
MOST_NEW_BYTES = 8 << 30
EXPLOITED = "exploited"

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
FORBIDDEN_EVENTS = {
    "os.exec",
    "os.fork",
    "os.mkdir",
    "os.posix_spawn",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.system",
    "pickle.find_class",
    "shutil.rmtree",
    "socket.connect",
    "socket.getaddrinfo",
    "subprocess.Popen",
}


@dataclass(frozen=True)
class Subject:
    """Something that reads files from outside.

    Args:
        name: Part of every case's seed.
        pristine: A folder with good input, copied for each case.
        damage: Changes the copy; returns what it did, in words.
        read: Reads the copy; whatever it raises but a UserError is a failure.
        writes: Whether reading may write beside the copy for a while, as ``prepare`` does.
    """

    name: str
    pristine: Path
    damage: Callable[[Path, random.Random], str]
    read: Callable[[Path], object]
    writes: bool = False


class TookTooLong(BaseException):
    """Not an Exception, so that no library takes it for its own."""


class Watch:
    """Records what the process does while a case runs, by Python's audit events."""

    def __init__(self) -> None:
        self.folder: Path | None = None  # of the case that runs
        self.may_write = False
        self.seen: list[str] = []
        sys.addaudithook(self._hear)  # for the rest of the process: Python has no way to remove one

    def _hear(self, event: str, arguments: tuple) -> None:
        if self.folder is None:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & WRITING and not self._harmless(str(path)):
                self.seen.append(f"{event} {arguments}")
        elif event == "exec":
            if str(self.folder) in getattr(arguments[0], "co_filename", ""):
                self.seen.append(f"{event} {arguments}")
        elif event in FORBIDDEN_EVENTS and not (self.may_write and event.startswith(("os.", "shutil."))):
            if not self._harmless(str(arguments[0])):
                self.seen.append(f"{event} {arguments}")

    def _harmless(self, path: str) -> bool:
        # Modules that are imported late leave their bytecode behind, and files that were hashed are remembered.
        is_kept = "__pycache__" in path or path.startswith(os.environ["XDG_CACHE_HOME"])
        return self.may_write or is_kept or path == os.devnull


def contents_of(folder: Path) -> dict[str, tuple]:
    """Kind, bytes and time of change of every entry below ``folder``; links are not followed."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in folders + files:
            path = Path(parent, name)
            status = path.lstat()
            regular = path.is_file() and not path.is_symlink()
            found[str(path)] = (status.st_mode, path.read_bytes() if regular else None, status.st_mtime_ns)
    return found


def reason_it_is_not_inert(message: str) -> str | None:
    """Why a message may not be shown; None where it may."""
    if not message.strip():
        return "it is empty"
    if len(message.splitlines()) > 1:
        return "it has several lines"
    if found := OBEYED.search(message):
        return f"it holds {found[0]!r}"
    if len(message) > 2 * LONGEST_LINE:
        return f"it has {len(message)} characters"
    return None


@pytest.fixture(scope="session")
def watch() -> Watch:
    return Watch()


@pytest.fixture
def limits(monkeypatch) -> Iterator[None]:
    """A clock for every case, and an end to memory."""
    ours = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_NEW_BYTES, ours[1]))
    before = signal.signal(signal.SIGALRM, _ring)
    yield
    signal.signal(signal.SIGALRM, before)
    resource.setrlimit(resource.RLIMIT_AS, ours)


def _ring(*_) -> None:
    raise TookTooLong


@contextmanager
def _clock() -> Iterator[None]:
    signal.setitimer(signal.ITIMER_REAL, SECONDS_PER_CASE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def fuzz(subject: Subject, count: int, seed: int, folder: Path, watch: Watch, monkeypatch) -> Counter:
    """Run ``count`` cases in ``folder``; how many inputs were accepted and refused.

    Raises:
        AssertionError: with the seed and number of the first case that did anything else.
    """
    outcomes: Counter = Counter()
    for number in range(count):
        run_case(subject, seed, number, folder / f"case-{number}", watch, monkeypatch, outcomes)
        shutil.rmtree(folder / f"case-{number}")
    print(f"{subject.name}: {count} inputs, {outcomes['accepted']} accepted, {outcomes['refused']} refused")
    return outcomes


def run_case(subject: Subject, seed: int, number: int, folder: Path, watch: Watch, monkeypatch, outcomes: Counter):
    """One case, by its seed and number."""
    rng = random.Random(f"{subject.name} {seed} {number}")
    shutil.copytree(subject.pristine, folder / "input")
    what = subject.damage(folder / "input", rng)
    case = f"{subject.name}, seed {seed}, case {number} ({what})"
    before = contents_of(folder)
    monkeypatch.chdir(folder)
    # What the library below would read by unpickling goes through this function.
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail(f"{case}: torch.load was called"))
    watch.folder, watch.may_write, watch.seen = folder, subject.writes, []
    try:
        with _clock():
            subject.read(Path("input"))
        outcomes["accepted"] += 1
    except UserError as error:
        outcomes["refused"] += 1
        assert (reason := reason_it_is_not_inert(str(error))) is None, f"{case}: {reason}: {str(error)!r}"
    except TookTooLong as error:
        raise AssertionError(f"{case}: still busy after {SECONDS_PER_CASE} s") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # Rust's panics are no Exceptions
        raise AssertionError(f"{case}: {type(error).__name__}: {str(error)[:500]}") from error
    finally:
        watch.folder = None
    monkeypatch.undo()
    assert not watch.seen, f"{case}: {watch.seen[:3]}"
    after = contents_of(folder)
    assert after == before, f"{case}: changed {sorted(after.items() ^ before.items())[:3]}"
