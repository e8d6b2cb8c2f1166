"""Parts to read, in a module of their own: the processes that read them import little."""

from __future__ import annotations

from collections.abc import Iterator

from avatarl.data.readers import Piece


def count_to(number: int) -> Iterator[Piece]:
    """A part of as many pieces; text that needs care on the way through a file, and a piece that ends nothing."""
    for index in range(number):
        yield Piece(f'{number}:{index} "é漢🙂"\n\r\u2028\0', ends_document=index % 2 == 1)


def fail(error: Exception) -> Iterator[Piece]:
    yield Piece("before", ends_document=True)
    raise error
