"""Sanitise untrusted text: a terminal shows it and does not obey it, and it cannot change a page."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import IO, Any

LONGEST_LINE = 1000

# What a terminal or an editor obeys instead of showing: control characters (C0, C1, DEL) but for line feed and tab,
# marks that turn the direction of writing, line and paragraph separators, annotations, tags, and halves of surrogate
# pairs, which cannot be written as UTF-8 at all.
OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """Escape the characters of ``text`` that a terminal would obey (``\\x1b``); keep line feeds and tabs."""
    return OBEYED.sub(_escape, text)


def one_line(text: str) -> str:
    """Join ``text`` to one line, escape it as :func:`visible` does, and cut out the middle of a long one."""
    line = visible(" ".join(part.strip() for part in text.splitlines()))
    if len(line) <= LONGEST_LINE:
        return line
    return f"{line[: LONGEST_LINE * 3 // 4]} … {line[-LONGEST_LINE // 4 :]}"


class SanitisedStream:
    """A text stream that passes everything through :func:`visible` before writing it to ``inner``."""

    def __init__(self, inner: IO[str]):
        self.inner = inner

    def write(self, text: str) -> int:
        self.inner.write(visible(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@contextmanager
def sanitised_output() -> Iterator[None]:
    """Sanitise everything that Python prints within it: messages, warnings and tracebacks of any library."""
    with redirect_stdout(SanitisedStream(sys.stdout)), redirect_stderr(SanitisedStream(sys.stderr)):
        yield


def markdown_code(text: str) -> str:
    """Return a Markdown code span that ``text`` cannot end, for a paragraph or a cell of a table."""
    line = one_line(text).replace("|", "\\x7c")  # a bar ends a cell, even within a code span
    fence = backticks_around(line, fewest=1)
    padding = " " if line.startswith("`") or line.endswith("`") or not line.strip() else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def backticks_around(text: str, fewest: int) -> str:
    """Return a fence for ``text``: one backtick more than its longest run of them, and at least ``fewest``."""
    return "`" * max(fewest, 1 + max(map(len, re.findall("`+", text)), default=0))


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
