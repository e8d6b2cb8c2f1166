"""Read the parts of a text with several processes; their number does not change the order."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from avatarl.errors import RunFailed, UserError

SILENT_TRACKER = "ignore:resource_tracker:UserWarning"


class Piece(NamedTuple):
    """A stretch of one document; the document is its pieces joined."""

    text: str
    ends_document: bool


Part = Callable[[], Iterator[Piece]]  # whole documents, which one process reads at a time


def read_parts(parts: Sequence[Part], processes: int = 1, folder: Path | None = None) -> Iterator[Iterator[Piece]]:
    """Yield the pieces of each part, one part after the other; exhaust each iterator before asking for the next.

    Several processes write each part to a file first, since it may be larger than memory. The disk holds at most one
    part per process and the one being read back.

    Args:
        parts: What to read; functions and arguments that can be pickled.
        processes: How many read at once; one reads in this process, without files.
        folder: Where the files lie; None for the system's folder for temporary files.

    Raises:
        UserError: What a part raises.
        RunFailed: A process fails in another way, or is killed.
    """
    count = min(processes, len(parts))
    if count < 2:
        for part in parts:
            yield part()
        return
    with tempfile.TemporaryDirectory(prefix="read-", dir=folder) as scratch, _pool(count) as pool:
        files = [Path(scratch, str(number)) for number in range(len(parts))]
        jobs = [pool.submit(_write, part, file) for part, file in zip(parts[:count], files[:count], strict=True)]
        for number, file in enumerate(files):
            try:
                jobs[number].result()
                if number + count < len(parts):
                    jobs.append(pool.submit(_write, parts[number + count], files[number + count]))
            except BrokenProcessPool as error:
                raise RunFailed(
                    "a process that reads sources was killed, perhaps for want of memory; try fewer processes"
                ) from error
            with file.open(encoding="utf-8") as lines:
                yield (Piece(*json.loads(line)) for line in lines)
            file.unlink()


@contextlib.contextmanager
def _pool(count: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end at once when this context or this process does, whatever they are doing."""
    # Do not fork from here: threads of the tokenizer and the progress bar may hold locks, which a fork copies.
    context = multiprocessing.get_context("forkserver")
    # If this process is killed, Python's tracker removes the semaphores of the pool; its warning would only alarm.
    sys.warnoptions.append(SILENT_TRACKER)
    resource_tracker.ensure_running()
    sys.warnoptions.remove(SILENT_TRACKER)
    context.set_forkserver_preload(["avatarl.data.corpus", "datasets"])
    theirs, ours = context.Pipe(duplex=False)
    with theirs, ProcessPoolExecutor(count, context, _set_up_process, (theirs,)) as pool:
        try:
            yield pool
        finally:
            ours.close()


def _set_up_process(parent: Connection) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # sent to all; the parent decides
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        parent.recv()  # nothing is ever sent: it returns when the other end is closed
    os._exit(1)


def _write(part: Part, file: Path) -> None:
    """Write a part to a file, one piece a line."""
    try:
        with file.open("w", encoding="utf-8") as lines:
            for piece in part():
                lines.write(json.dumps(piece, ensure_ascii=False) + "\n")
    except UserError:
        raise
    except Exception as error:  # of a kind that may not survive the way to the parent
        raise RunFailed(f"{type(error).__name__}: {error}") from None
