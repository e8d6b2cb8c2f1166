"""The ways a command ends early: a user's mistake, a run that fails, a run that is stopped."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from .sanitise import one_line


class UserError(ValueError):
    """A setting, file or folder that cannot be used.

    The message names the setting or file, what was found and what would be accepted, on one sanitised line. The command
    line prints it without a traceback and exits with status 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class RunFailed(RuntimeError):
    """A failure of the run itself, with usable settings; the command line exits with status 1."""


class RunStopped(KeyboardInterrupt):
    """A run that a signal stopped, after saving its state; the command line exits with 128 plus the signal.

    It is a ``KeyboardInterrupt`` so that a script that catches ordinary exceptions does not go on to its next run.
    """

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name closest to ``name``, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""
