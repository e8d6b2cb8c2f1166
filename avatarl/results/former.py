"""Tables as the comparison still builds them; goes with its move to :class:`avatarl.results.reporter.Table`."""

from __future__ import annotations

from typing import NamedTuple

from .reporter import Cell


class Row(NamedTuple):
    """A line of a table."""

    name: str
    cells: tuple[Cell, ...]
    unit: str = ""
    is_marked: bool = False


class Table(NamedTuple):
    """Rows in sections, each with its heading, which may be empty."""

    caption: str
    columns: tuple[str, ...]
    sections: tuple[tuple[str, tuple[Row, ...]], ...]
    corner: str = ""
    is_of_words: bool = False
