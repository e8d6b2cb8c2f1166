"""Text from outside as text and nothing else: no terminal obeys it, no page is changed by it."""

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
    """``text`` with the characters that a terminal would obey shown as escapes (``\\x1b``); lines and tabs stay."""
    return OBEYED.sub(_escape, text)


def one_line(text: str) -> str:
    """``text`` on one line, inert, and no longer than a person would read; the middle of a longer one is left out."""
    line = visible(" ".join(part.strip() for part in text.splitlines()))
    if len(line) <= LONGEST_LINE:
        return line
    return f"{line[: LONGEST_LINE * 3 // 4]} … {line[-LONGEST_LINE // 4 :]}"


class InertStream:
    """A stream for text that a terminal may show: whatever is written to ``inner`` is made visible before."""

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
    """Within it all that Python prints is inert: messages, warnings, tracebacks, whoever wrote them."""
    with redirect_stdout(InertStream(sys.stdout)), redirect_stderr(InertStream(sys.stderr)):
        yield


def markdown_code(text: str) -> str:
    """``text`` as a Markdown code span that it cannot leave, in a paragraph or in a cell of a table."""
    line = one_line(text).replace("|", "\\x7c")  # a table would be cut at a bar, even within a code span
    fence = backticks_around(line, fewest=1)
    padding = " " if line.startswith("`") or line.endswith("`") or not line.strip() else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def backticks_around(text: str, fewest: int) -> str:
    """Backticks for a fence or a code span: more than any run of them in ``text``."""
    return "`" * max(fewest, 1 + max(map(len, re.findall("`+", text)), default=0))


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
