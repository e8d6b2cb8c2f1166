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

STOPPED = "stopped, and nothing is left of it; the same command starts again"
PATIENCE_SECONDS = 1.0
WRITTEN = re.compile(rf"(bytes-)?(train|valid|waiting)-\d+\.bin|{re.escape(MANIFEST)}|{TOKENIZER_FOLDER}|read-\w+")
PREFIX = ".unfinished-"
UNFINISHED, DATA = f"{PREFIX}preparation", "data"  # after the name of ``out``, and what lies in there beside a lock


@contextlib.contextmanager
def all_or_nothing(out: Path) -> Iterator[Path]:
    """Yield a new folder that takes the name ``out`` at the end, or goes without a trace.

    It lies in a hidden folder beside ``out``, or, if ``out`` exists and is empty, in one within it; then its files are
    moved up at the end. The hidden folder is locked. The kernel takes the lock back from a process that is killed, so
    that the next one knows what it may remove.

    Raises:
        UserError: ``out`` is not empty, cannot be made, or another process is making it.
        RunFailed: ``out`` has changed meanwhile.
        RunStopped: SIGTERM or SIGHUP, in the main thread.
    """
    remove_left(out)
    # An existing folder is filled, not replaced: it may be a link, a mount point, or somebody's working directory.
    is_there = os.path.exists(out)
    if is_there and not (out.is_dir() and _is_empty(out)):
        raise UserError(f"out: {out} exists and is not empty; a new or empty folder is expected")
    place = out / UNFINISHED if is_there else out.parent / f".{out.name}{UNFINISHED}"
    if os.path.lexists(place) and not _is_ours(place):
        raise UserError(f"out: {place} is in the way: a link, or what `prepare` did not write; move it away")
    new_parents = [parent for parent in out.parents if not os.path.exists(parent)]  # innermost first

    def clear() -> None:
        shutil.rmtree(place, ignore_errors=True)
        for parent in new_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()

    with contextlib.ExitStack() as stack:
        with refusing(f"out: {place} cannot be made (", "); a writable place is expected"):
            place.mkdir(parents=True, exist_ok=True)
            stack.enter_context(RunLock(place))
        folder = place / DATA
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
            raise RunFailed(
                f"out: {out} is no longer as it was ({error.strerror}); what was made is {folder}"
            ) from error
        shutil.rmtree(place, ignore_errors=True)


def remove_left(out: Path) -> None:
    """Remove what killed processes have left of making ``out``."""
    for left in (*out.parent.glob(f".{glob.escape(out.name)}{PREFIX}*"), *out.glob(f"{PREFIX}*")):
        if _is_ours(left):
            with contextlib.suppress(UserError), RunLock(left):  # not what a living one is writing
                _remove_unfinished(left, out)


@contextlib.contextmanager
def _stoppable(clear: Callable[[], None]) -> Iterator[None]:
    """Turn SIGTERM and SIGHUP, which would end the process at once, into RunStopped.

    Python handles signals in its main thread alone, which may wait for minutes for threads that train a tokenizer.
    Then another thread calls ``clear`` and ends the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handled = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    has_ended = threading.Event()

    def stop(signum: int, _frame) -> None:
        for number in handled:  # a second one must not end the clearing up
            signal.signal(number, signal.SIG_IGN)
        raise RunStopped(signum, STOPPED)

    def watch() -> None:
        while not has_ended.is_set():
            (signum,) = os.read(reading, 1)
            if signum in handled and not has_ended.wait(PATIENCE_SECONDS):
                clear()
                show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
                os.write(2, f"{show_cursor}avatarl: {STOPPED}\n".encode())
                os._exit(128 + signum)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    before = signal.set_wakeup_fd(writing)
    try:
        for number in handled:
            signal.signal(number, stop)
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(before)
        has_ended.set()
        os.write(writing, b"\0")
        watcher.join()
        os.close(reading)
        os.close(writing)


def _is_ours(place: Path) -> bool:
    """Whether a hidden folder holds nothing but what ``prepare`` writes."""
    if place.is_symlink() or not place.is_dir():
        return False
    held = [path for path in (*place.iterdir(), *place.glob(f"{DATA}/*")) if path.name != LOCK]
    return all((path.name == DATA or WRITTEN.fullmatch(path.name)) and not path.is_symlink() for path in held)


def _remove_unfinished(place: Path, out: Path) -> None:
    """Remove what a killed process has left, and what it had moved up from there: all but the manifest."""
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
    """Whether a folder holds nothing but what others are making."""
    return all(path.name.startswith(PREFIX) for path in folder.iterdir())
