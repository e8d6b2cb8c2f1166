"""The one kind of error that is the user's to mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A setting, file or folder that cannot be used, said in one line.

    The message names the setting or file, what was found and what would be accepted. The command line prints
    it without a traceback and exits with status 2; in Python it is an ordinary ``ValueError``.
    """


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name closest to ``name``, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""
