"""Parts to read, in a module of their own: the processes that read them import little."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from avatarl.data.readers import Piece


def count_to(number: int) -> Iterator[Piece]:
    """A part of as many pieces; text that needs care on the way through a file, and a piece that ends nothing."""
    for index in range(number):
        yield Piece(f'{number}:{index} "é漢🙂"\n\r\u2028\0', ends_document=index % 2 == 1)


def fail(error: Exception) -> Iterator[Piece]:
    yield Piece("before", ends_document=True)
    raise error


def take_seconds(file: Path) -> Iterator[Piece]:
    """A part that makes ``file`` once it has been read to its end."""
    yield Piece("slow", ends_document=True)
    time.sleep(5)
    file.touch()
