"""How a command can end before its end: by a user's mistake, a run that fails, a run that is asked to stop."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from .sanitise import one_line


class UserError(ValueError):
    """A setting, file or folder that cannot be used, said in one line.

    The message names the setting or file, what was found and what would be accepted; it is made inert, since what was
    found may be hostile. The command line prints it without a traceback and exits with status 2; in Python it is an
    ordinary ``ValueError``.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class RunFailed(RuntimeError):
    """The run itself went wrong, not the user's settings; the command line exits with status 1."""


class RunStopped(KeyboardInterrupt):
    """The run was asked to stop and has saved what it had; the command line exits with 128 plus the signal.

    A ``KeyboardInterrupt``, whichever signal it was: who catches ordinary exceptions did not ask for the next run.
    """

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name closest to ``name``, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""
