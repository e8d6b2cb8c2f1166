"""A folder that is there as a whole or not at all, however the process that makes it ends."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from avatarl.data.dataset import MANIFEST, TOKENIZER_FOLDER, file_record, read_manifest
from avatarl.durable import remove
from avatarl.errors import RunFailed, RunStopped, UserError
from avatarl.lock import LOCK, RunLock
from avatarl.untrusted import refusing

STOPPED = "stopped, and nothing is left of it; the same command begins anew"
PATIENCE_SECONDS = 1.0
WRITTEN = re.compile(rf"(bytes-)?(train|valid|waiting)-\d+\.bin|{re.escape(MANIFEST)}|{TOKENIZER_FOLDER}")
UNFINISHED, DATA = ".unfinished-preparation", "data"  # behind the name of ``out``, and what lies in there beside a lock


@contextlib.contextmanager
def all_or_nothing(out: Path) -> Iterator[Path]:
    """A new folder that takes the name ``out`` at the end, or goes without a trace.

    It lies in a hidden folder beside ``out``; where ``out`` is there and empty, in one within it, and its files are
    moved up at the end. The hidden folder is locked. The kernel takes the lock back from a process that is killed, so
    that the next one knows what it may remove.

    Raises:
        UserError: ``out`` is not empty, cannot be made, or another process is making it.
        RunFailed: ``out`` has changed meanwhile.
        RunStopped: SIGTERM or SIGHUP, in the main thread.
    """
    remove_left(out)
    if os.path.exists(out) and not (out.is_dir() and _is_empty(out)):
        raise UserError(f"out: {out} exists and is not empty; a new or empty folder is expected")
    missing_parents = [parent for parent in out.parents if not os.path.exists(parent)]  # innermost first
    # What is there stays: a link, the mount point of a volume, or where somebody works cannot be replaced.
    is_there = os.path.exists(out)
    place = out / UNFINISHED if is_there else out.parent / f".{out.name}{UNFINISHED}"
    if os.path.lexists(place) and not _is_ours(place):
        raise UserError(f"out: {place} is in the way: a link, or what `prepare` did not write; move it away")
    with contextlib.ExitStack() as stack:
        with refusing(f"out: {place} cannot be made (", "); a writable place is expected"):
            place.mkdir(parents=True, exist_ok=True)
            stack.enter_context(RunLock(place))
        folder = place / DATA

        def clear() -> None:
            shutil.rmtree(place, ignore_errors=True)
            for parent in missing_parents:
                with contextlib.suppress(OSError):
                    parent.rmdir()

        with _stoppable(clear):
            try:
                folder.mkdir()
                yield folder
                made = sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST) if is_there else [folder]
            except BaseException:
                clear()
                raise
        try:
            if is_there and not _is_empty(out):
                raise OSError(errno.ENOTEMPTY, "somebody else has written into it")
            for path in made:  # the manifest last, without which it is no prepared folder
                path.rename(out / path.name if is_there else out)
        except OSError as error:
            reason = error.strerror
            raise RunFailed(f"out: {out} is no longer as it was ({reason}); what was made is {folder}") from error
        shutil.rmtree(place, ignore_errors=True)


def remove_left(out: Path) -> None:
    """Remove what processes that are gone have left of making ``out``."""
    for left in (*out.parent.glob(f".{glob.escape(out.name)}.unfinished-*"), *out.glob(".unfinished-*")):
        if _is_ours(left):
            with contextlib.suppress(UserError), RunLock(left):  # not what a living one is writing
                _remove_unfinished(left, out)


@contextlib.contextmanager
def _stoppable(clear: Callable[[], None]) -> Iterator[None]:
    """Turn SIGTERM and SIGHUP, which would end the process at once, into RunStopped.

    Python heeds signals in its main thread alone, and while a tokenizer is trained, that one may wait for minutes for
    threads that are none of Python's. Then another thread calls ``clear`` and ends the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heeded = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    has_ended = threading.Event()

    def stop(signum: int, _frame) -> None:
        for number in heeded:  # a second one must not end the clearing up
            signal.signal(number, signal.SIG_IGN)
        raise RunStopped(signum, STOPPED)

    def watch() -> None:
        while not has_ended.is_set():
            (signum,) = os.read(reading, 1)
            if signum in heeded and not has_ended.wait(PATIENCE_SECONDS):
                clear()
                show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
                os.write(2, f"{show_cursor}avatarl: {STOPPED}\n".encode())
                os._exit(128 + signum)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    before = signal.set_wakeup_fd(writing)
    try:
        for number in heeded:
            signal.signal(number, stop)
        yield
    finally:
        for number in heeded:
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(before)
        has_ended.set()
        os.write(writing, b"\0")
        watcher.join()
        os.close(reading)
        os.close(writing)


def _is_ours(place: Path) -> bool:
    """Whether a hidden folder has a name that ``prepare`` gives, and holds nothing but what ``prepare`` writes.

    Earlier versions put a process's number behind the name, and the files right there.
    """
    is_earlier = re.fullmatch(r"\d+", place.name.rpartition("-")[2]) is not None
    if place.is_symlink() or not place.is_dir() or not (is_earlier or place.name.endswith(UNFINISHED)):
        return False
    held = {path.name: path for path in place.iterdir()}
    held.pop(LOCK, None)
    if not is_earlier and (data := held.pop(DATA, None)):
        if held or data.is_symlink() or not data.is_dir():
            return False
        held = {path.name: path for path in data.iterdir()}
    return all(WRITTEN.fullmatch(name) and not path.is_symlink() for name, path in held.items())


def _remove_unfinished(place: Path, out: Path) -> None:
    """Remove what a process that is gone has left, and what it had moved up from there: all but the manifest."""
    data = place / DATA
    if place.parent == out and (data / MANIFEST).is_file() and not os.path.lexists(out / MANIFEST):
        with contextlib.suppress(UserError):
            for name, record in read_manifest(data)[1]["files"].items():
                path = out / name
                # By its name and by what it holds: whoever writes a manifest can name the files of others.
                if WRITTEN.fullmatch(Path(name).parts[0]) and path.is_file() and file_record(path) == record:
                    remove(path)
            with contextlib.suppress(OSError):
                (out / TOKENIZER_FOLDER).rmdir()
    shutil.rmtree(place, ignore_errors=True)


def _is_empty(folder: Path) -> bool:
    """Whether nothing lies in a folder but what others are making."""
    return all(path.name.startswith(".unfinished-") for path in folder.iterdir())
