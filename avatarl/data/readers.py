"""Reading with several processes, in an order that does not depend on how many they are."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from avatarl.errors import RunFailed, UserError


class Piece(NamedTuple):
    """A stretch of one document; the document is its pieces joined."""

    text: str
    ends_document: bool


Part = Callable[[], Iterator[Piece]]  # whole documents, which one process reads at a time


def read_parts(parts: Sequence[Part], processes: int = 1, folder: Path | None = None) -> Iterator[Iterator[Piece]]:
    """Yield the pieces of each part, one part after the other; each iterator ends before the next one is asked for.

    Process p of P reads the parts p, p + P, p + 2P … A part may be larger than memory, and is wanted only when those
    before it are done, so it is written to a file first. On disk lie at most one part of each process and the one that
    is being read back.

    Args:
        parts: What to read; functions and arguments that can be pickled.
        processes: How many read at once; one reads here, without files.
        folder: Where the files lie; the system's folder for temporary files when None.

    Raises:
        UserError: What a part raises.
        RunFailed: A process fails in another way, or is killed.
    """
    count = min(processes, len(parts))
    if count < 2:
        for part in parts:
            yield part()
        return
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="read-", dir=folder)))
        readers = [stack.enter_context(_reader()) for _ in range(count)]
        files = [scratch / str(number) for number in range(len(parts))]
        for number, reader in enumerate(readers):
            reader.ask(parts[number], files[number])
        for number, file in enumerate(files):
            reader = readers[number % count]
            reader.wait()
            if number + count < len(parts):
                reader.ask(parts[number + count], files[number + count])
            yield _pieces_of(file)
            file.unlink()


def _pieces_of(file: Path) -> Iterator[Piece]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            yield Piece(*json.loads(line))


class _Reader(NamedTuple):
    """A process that reads what it is asked for."""

    process: BaseProcess
    connection: Connection

    def ask(self, part: Part, file: Path) -> None:
        """Have a part written to a file."""
        with contextlib.suppress(BrokenPipeError):  # it has ended, which `wait` finds and explains
            self.connection.send((part, file))

    def wait(self) -> None:
        """Until the file is there."""
        try:
            error = self.connection.recv()
        except (EOFError, ConnectionResetError) as gone:
            self.process.join()
            code = self.process.exitcode
            how = f"was ended by signal {-code}" if code < 0 else f"ended with exit status {code}"
            raise RunFailed(f"a process that read sources {how}; fewer of them take less memory") from gone
        if error is not None:
            raise error


@contextlib.contextmanager
def _reader() -> Iterator[_Reader]:
    # Not forked from here: there are threads, of the tokenizer and the progress bar, and a fork copies their locks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["avatarl.data", "datasets"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    try:
        yield _Reader(process, ours)
    finally:
        process.kill()
        process.join()
        ours.close()


def _serve(connection: Connection) -> None:
    """The life of a process that reads: it is asked for parts until it is killed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # sent to all; the process that asks decides
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, ConnectionError):  # the process that asks is gone
        while True:
            part, file = connection.recv()
            connection.send(_write(part, file))


def _write(part: Part, file: Path) -> Exception | None:
    """Write a part to a file; what went wrong, if anything."""
    try:
        with file.open("w", encoding="utf-8") as lines:
            for piece in part():
                lines.write(json.dumps(piece, ensure_ascii=False) + "\n")
    except UserError as error:
        return error
    except Exception as error:
        return RunFailed(f"{type(error).__name__}: {error}")
    return None


def _end_with_parent() -> None:
    """A process that was killed cannot end those that it started."""
    multiprocessing.parent_process().join()
    os._exit(1)
