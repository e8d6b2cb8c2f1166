"""A lock on a folder that one process at a time writes.

`flock` is released by the kernel however its holder ends. The package filelock uses it too, but leaves the file behind
and, on a file system without `flock`, falls back to a marker that a killed process never removes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from pathlib import Path

from avatarl.errors import UserError

from .durable import open_own

LOCK = ".lock"


class RunLock:
    """A context manager that holds a folder's lock; its file names the holder and goes when the lock is released.

    Args:
        folder: What to lock.
        patience_seconds: How long to wait for another holder.
    """

    def __init__(self, folder: Path, patience_seconds: float = 0):
        self._path = folder / LOCK
        self._patience_seconds = patience_seconds
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        """Take the lock.

        Raises:
            UserError: Another process still holds it after ``patience_seconds``, or its file is a link.
        """
        import fcntl  # POSIX only; reading models needs no lock

        until = time.monotonic() + self._patience_seconds
        while self._descriptor is None:
            descriptor = open_own(self._path, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
                os.close(descriptor)
                if time.monotonic() < until:
                    time.sleep(1)
                    continue
                raise UserError(f"{self._path.parent} is being written by {holder}; wait for it, or stop it") from error
            except OSError as error:
                os.close(descriptor)
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                raise UserError(
                    f"{self._path.parent} lies on a file system that cannot lock files; "
                    "expected a local disk or a network file system with flock"
                ) from error
            if self._is_still_there(descriptor):
                self._descriptor = descriptor
            else:
                os.close(descriptor)  # the holder released the lock and removed the file after it was opened here
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(OSError):  # a disk that is gone
            self._path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None

    def _is_still_there(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False
