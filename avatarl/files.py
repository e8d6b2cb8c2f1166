"""Files of others: read by calls that can fail, looked at after every read, and hashed once.

A fault in mapped memory is a signal, which Python cannot catch, so what is too large to copy is read with ``pread``.
Whoever writes into a file moves its times first: while they stay, what is read is what was opened. What was once found
in a file is remembered with its size, times and inode in the user's cache folder, since the file's own folder may be
read-only or somebody else's.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import resource
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from .errors import RunFailed
from .sanitise import one_line
from .untrusted import read_regular_file

LOG = logging.getLogger(__name__)
READ_AT_ONCE = 1 << 20
# A process may open so many files in all, sockets and pipes among them.
MOST_HELD = max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
# Enough to keep a disk busy; hashing leaves the interpreter free.
HASHING_THREADS = 4
WORTH_A_LINE_BYTES = 1 << 30  # some seconds
PATIENCE_SECONDS, SLOWEST_BYTES_PER_SECOND = 1.0, 50e6
# A file that is written twice within a tick of its file system's clock may keep its times; git waits as long.
RACY_NS = 2_000_000_000
LARGEST_MEMORY_BYTES = 1 << 28


class Stamp(NamedTuple):
    """What changes when a file does. Not its device: a network's or container's gets another number at every mount."""

    size: int
    modified_ns: int
    changed_ns: int
    inode: int

    @classmethod
    def of(cls, found: os.stat_result) -> Stamp:
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


class File:
    """A file that is read by position. The first of many stay open, the others are opened for every read."""

    _held = 0

    def __init__(self, path: Path, sha256: str | None = None, stamp: Stamp | None = None):
        """``sha256`` is what its content has to be should somebody touch it, ``stamp`` what it was opened as before.

        Raises:
            RunFailed: It cannot be opened.
        """
        self.path, self.sha256 = path, sha256
        self._descriptor: int | None = None
        descriptor = self._open()
        self.stamp = stamp or Stamp.of(os.fstat(descriptor))
        if File._held < MOST_HELD:
            File._held += 1
            self._descriptor = descriptor
            weakref.finalize(self, File._let_go, descriptor).atexit = False
        else:
            os.close(descriptor)

    def __reduce__(self) -> tuple:  # into another process, where the descriptor's number means another file
        return File, (self.path, self.sha256, self.stamp)

    def read(self, start: int, size: int) -> bytes:
        """Bytes [start, start + size) of the file as it was opened; fewer at its end.

        Raises:
            RunFailed: It cannot be read, or somebody has changed it.
        """
        descriptor = self._open() if self._descriptor is None else self._descriptor
        try:
            while True:
                content = os.pread(descriptor, size, start)
                while len(content) < size and (more := os.pread(descriptor, size - len(content), start + len(content))):
                    content += more
                found = Stamp.of(os.fstat(descriptor))
                if found == self.stamp:
                    return content
                self._accept(descriptor, found)
        except OSError as error:
            raise RunFailed(f"{self.path} cannot be read ({error.strerror})") from error
        finally:
            if descriptor != self._descriptor:
                os.close(descriptor)

    def check(self) -> None:
        """Look whether the file is what was opened; see :meth:`read`."""
        self.read(0, 0)

    def digest(self) -> str:
        """SHA-256 of its content."""
        return self.look_through(1, lambda _: 0)[0]

    def look_through(self, unit: int, largest: Callable[[bytes], int]) -> list:
        """``[SHA-256, the largest number]`` of its content, read once in blocks of whole units of so many bytes."""
        digest, found, step = hashlib.sha256(), -1, max(1, READ_AT_ONCE // unit) * unit
        for start in range(0, self.stamp.size, step):
            block = self.read(start, step)
            digest.update(block)
            found = max(found, largest(block))
        return [digest.hexdigest(), found]

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise RunFailed(f"{self.path} cannot be read ({error.strerror})") from error

    @staticmethod
    def _let_go(descriptor: int) -> None:
        os.close(descriptor)
        File._held -= 1

    def _accept(self, descriptor: int, found: Stamp) -> None:
        """Take it as it is ``found`` if its content is the same: somebody copied, touched, linked or removed it."""
        digest, start = hashlib.sha256(), 0
        while start < found.size == self.stamp.size and (block := os.pread(descriptor, READ_AT_ONCE, start)):
            digest.update(block)
            start += len(block)
        if found.size != self.stamp.size or digest.hexdigest() != self.sha256:
            raise RunFailed(f"{self.path} has changed while it was in use; put it back as it was to go on")
        self.stamp = found
        with contextlib.suppress(OSError):
            if os.stat(self.path).st_ino == found.inode:
                return
        _say_once(f"files of {self.path.parent} were removed or replaced; what was opened is still read")


@functools.cache
def _say_once(message: str) -> None:
    LOG.warning("%s", one_line(message))


def ask(folder: Path, questions: Sequence[tuple[File, str, Callable[[File], Any]]], anew: bool = False) -> list:
    """What files of ``folder`` are found to hold, remembered for as long as they stay as they are.

    Args:
        folder: Where they lie.
        questions: A file, a question's name, and what finds the answer by reading the file.
        anew: Read them all, whatever is remembered.

    Raises:
        RunFailed: A file cannot be read, or changes meanwhile.
    """
    memory, real = _memory_of(folder), os.path.realpath(folder)

    def known() -> dict[tuple, Any]:
        return {} if anew else _read_memory(memory)

    def key(file: File, what: str) -> tuple:
        return os.path.join(real, os.path.relpath(file.path, folder)), what, file.stamp

    found = known()
    answers = [found.get(key(file, what)) for file, what, _ in questions]
    if None not in answers:
        return answers
    with _one_at_a_time(memory, sum(file.stamp.size for file, *_ in questions)) as appended:
        found = known()  # by who was before us
        unread = {file for file, what, _ in questions if key(file, what) not in found}
        size = sum(file.stamp.size for file in unread)
        if size >= WORTH_A_LINE_BYTES:
            LOG.warning("%s", one_line(f"reading {folder} once to compare it with its SHA-256: {size / 1e9:.1f} GB"))

        def answer(question: tuple[File, str, Callable[[File], Any]]) -> Any:
            file, what, find = question
            if key(file, what) in found:
                return found[key(file, what)]
            began, value = time.time_ns(), find(file)
            if appended is not None and began - file.stamp.modified_ns > RACY_NS:
                line = json.dumps([*key(file, what), value])
                with contextlib.suppress(OSError):  # a full disk
                    os.write(appended, f"{_checksum(line)} {line}\n".encode())
            return value

        with ThreadPoolExecutor(HASHING_THREADS) as pool:
            return list(pool.map(answer, questions))


def _memory_of(folder: Path) -> Path:
    """The file that remembers what was found in a folder's."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        caches = Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()
    except RuntimeError:  # nobody knows the user's home
        caches = Path(os.devnull)
    return caches / "avatarl" / "files" / hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:32]


def _read_memory(memory: Path) -> dict[tuple, Any]:
    """What is remembered; a line that is not as it was written is none."""
    found = {}
    with contextlib.suppress(OSError, ValueError):
        for line in read_regular_file(memory, LARGEST_MEMORY_BYTES).decode("ascii", "replace").splitlines():
            checksum, _, content = line.partition(" ")
            if checksum == _checksum(content):
                path, what, stamp, value = json.loads(content)
                found[path, what, Stamp(*stamp)] = value
    return found


def _checksum(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@contextlib.contextmanager
def _one_at_a_time(memory: Path, size: int) -> Iterator[int | None]:
    """A descriptor to append to, None where there can be none, for one process after the other.

    So several that start together read the files only once. Who waits longer than reading them takes waits no more.
    """
    descriptor, until = None, time.monotonic() + PATIENCE_SECONDS + size / SLOWEST_BYTES_PER_SECOND
    try:
        with contextlib.suppress(OSError):
            memory.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(memory, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o600)
            while time.monotonic() < until:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.02)
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)
