"""One process at a time writes a run."""

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
    """A lock that the kernel takes back when its holder ends, however it ends. Use as a context manager.

    The file says who holds it. One that a killed process left behind is locked by nobody, and is taken over.
    """

    def __init__(self, run: Path, patience_seconds: float = 0):
        self._path = run / LOCK
        self._patience_seconds = patience_seconds
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        """Take the lock.

        Raises:
            UserError: Another process still holds it when patience is over, or its file is a link.
        """
        import fcntl  # POSIX alone has it, and reading models does not need it

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
                os.close(descriptor)  # its holder ended and removed the file after we had opened it
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(OSError):  # where the disk is gone, the lock is too
            self._path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None

    def _is_still_there(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False
