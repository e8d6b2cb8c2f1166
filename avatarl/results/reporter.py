"""What `avatarl report` and `avatarl compare` are made of: tables of text, charts of numbers, pages of both.

A table is a pandas frame of text. A template of :mod:`avatarl.results.pages` turns it into HTML or Markdown and escapes
whatever it holds.
"""

from __future__ import annotations

import base64
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from avatarl.durable import replace_file
from avatarl.errors import UserError
from avatarl.sanitise import one_line
from avatarl.untrusted import refusing
from avatarl.version import __version__

from .pages import read_source, render_markdown, render_page

SUFFIXES = (".html", ".md")
ABSENT = "—"
FLOPS_UNITS = ((1e21, "ZFLOPs"), (1e18, "EFLOPs"), (1e15, "PFLOPs"), (1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs"))

# --- numbers as text --------------------------------------------------------------------------------------------------


class Metric(NamedTuple):
    """How a number is shown, and whether more of it is better."""

    name: str
    title: str
    unit: str
    digits: int
    better: int = 0  # +1 where more is better, -1 where less is
    scale: float = 1.0


def fixed(value: float | None, digits: int) -> str:
    """A number with a fixed count of decimals and a typographic minus; a dash where there is none."""
    known = value is not None and math.isfinite(value)
    return f"{value:,.{digits}f}".replace("-", "−") if known else ABSENT


def signed(value: float, digits: int) -> str:
    """A difference with its sign; zero has none."""
    text = f"{value:+,.{digits}f}"
    return (text[1:] if float(text.replace(",", "")) == 0 else text).replace("-", "−")


def flops_unit(largest: float) -> tuple[float, str]:
    """The unit in which ``largest`` is a number of few digits, and its name."""
    return next((unit for unit in FLOPS_UNITS if largest >= unit[0]), (1.0, "FLOPs"))


# --- tables -----------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """A number, and below it its difference to the baseline."""

    text: str
    difference: str = ""  # with its sign, in the same unit
    verdict: str = ""  # "better" or "worse", which colours the difference


class Row(NamedTuple):
    """A table's row as templates read it."""

    name: str
    unit: str
    is_marked: bool
    cells: list[Cell]


@dataclass(frozen=True, eq=False)
class Table:
    """A frame of text with a caption.

    Args:
        frame: Each cell a text or a :class:`Cell`. The index has the rows' names, or in a MultiIndex the levels
            ``section``, ``name`` and ``unit``, of which only ``name`` must be there. Rows of a section stand together.
        caption: Shown above the table.
        corner: Names the rows.
        marked: For each row whether it stands out.
        is_of_words: Whether cells are words rather than numbers.
    """

    frame: pd.DataFrame
    caption: str = ""
    corner: str = ""
    marked: Sequence[bool] | None = None
    is_of_words: bool = False

    @property
    def columns(self) -> list[str]:
        return list(self.frame.columns)

    @property
    def sections(self) -> list[tuple[str, list[Row]]]:
        """Each section's heading, which may be empty, and its rows."""
        index = self.frame.index
        keys = index.to_frame(index=False) if isinstance(index, pd.MultiIndex) else pd.DataFrame({"name": index})
        keys = keys.reindex(columns=["section", "name", "unit"], fill_value="")
        marked = [False] * len(index) if self.marked is None else self.marked
        lines = zip(keys.to_numpy(), marked, self.frame.to_numpy(), strict=True)
        rows = [
            (
                section,
                Row(name, unit, bool(is_marked), [cell if isinstance(cell, Cell) else Cell(cell) for cell in cells]),
            )
            for (section, name, unit), is_marked, cells in lines
        ]
        return [(heading, [row for _, row in of_section]) for heading, of_section in groupby(rows, key=itemgetter(0))]


# --- charts -----------------------------------------------------------------------------------------------------------

# What tells a run's line from others besides its colour: dashes in pixels, and a marker by plotly's name with its
# outline around (20, 6) in a drawn sample of the line.
DASHES = ("", "8px,4px", "2px,4px", "9px,4px,2px,4px", "16px,5px", "16px,4px,2px,4px,2px,4px")
MARKERS = {
    "circle": "M16 6a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "square": "M16.5 2.5h7v7h-7z",
    "diamond": "M20 1l5 5-5 5-5-5z",
    "triangle-up": "M20 1.5l4.5 8h-9z",
    "cross": "M18.5 1.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
    "triangle-down": "M20 10.5l4.5-8h-9z",
}
COLOURS = 6  # --run0 to --run5 of colours.css


def line_style(number: int) -> dict[str, Any]:
    """What the line of a run, or of an arm, looks like; no two of 36 look the same."""
    shifted = (number + number // COLOURS) % COLOURS
    marker, outline = list(MARKERS.items())[shifted]
    return {"colour": number % COLOURS, "dash": DASHES[shifted], "marker": marker, "outline": outline}


def line_chart(
    event: str, metric: str, title: str, unit: str, lines: Mapping[int, Sequence[float | None]], note: str = ""
) -> dict[str, Any]:
    """One metric over training, as report.js draws it.

    Args:
        event: Whose places of ``axes`` in :class:`Charts` the values stand at.
        metric: The column of saved data.
        title, unit, note: Shown around it.
        lines: The values of each run by its number; None is a gap.
    """
    series = [{"run": number, "y": six_digits(values)} for number, values in lines.items()]
    return dict(id=f"{event}-{metric}", event=event, metric=metric, title=title, unit=unit, note=note, series=series)


class Charts(NamedTuple):
    """All charts of a page, and what they share."""

    axes: Mapping[str, Sequence[Mapping[str, Any]]]  # event → for each run {axis: places, or None if unknown}
    charts: Sequence[Mapping[str, Any]]  # of line_chart
    reliability: Sequence[Mapping[str, Any]] = ()
    line: str = "run"  # what a line is of
    titles: Mapping[str, str] = {}  # axis → its name, where not report.js's own


def six_digits(values: Sequence[float | None]) -> list[float | None]:
    """Numbers as a page's data have them: more digits would double its size; NaN and infinity are gaps."""
    known = (value is not None and np.isfinite(value) for value in values)
    return [float(f"{value:.6g}") if is_known else None for value, is_known in zip(values, known, strict=True)]


# --- pages ------------------------------------------------------------------------------------------------------------


def check_suffix(out: str | Path, suffixes: Sequence[str]) -> None:
    """Refuse a file whose name ends in none of ``suffixes``.

    Raises:
        UserError: naming it.
    """
    if Path(out).suffix not in suffixes:
        raise UserError(f"out is {out}; expected a name that ends in {' or '.join(suffixes)}")


def write_file(out: str | Path, content: str) -> None:
    """Write a file whole, or what a link leads to.

    Raises:
        UserError: It cannot be written.
    """
    with refusing(f"out is {out}, which cannot be written (", ")"):
        replace_file(Path(out).resolve(), content)


def write_page(out: Path, template: str, names: Sequence[str], charts: Charts, **values: Any) -> None:
    """Write a page: HTML with charts, or Markdown without, by the suffix of ``out``.

    Args:
        out: The file to write.
        template: The name of a template of :mod:`avatarl.results.pages`, without its suffix.
        names: Of the runs, or arms, whose lines the charts draw.
        charts: The charts.
        values: What the template names besides ``version``, ``written``, ``command``, ``runs`` and ``curves``, which
            is ``charts``.

    Raises:
        UserError: The file cannot be written.
    """
    values |= {
        "version": __version__,
        "written": datetime.now(UTC).isoformat(sep=" ", timespec="minutes").removesuffix("+00:00") + " UTC",
        "command": one_line(shlex.join([Path(sys.argv[0]).name.replace("__main__.py", "avatarl"), *sys.argv[1:]])),
        "runs": [{"name": name, **line_style(number)} for number, name in enumerate(names)],
        "curves": charts,
    }
    if out.suffix == ".md":
        content = render_markdown(f"{template}.md", **values)
    else:
        from plotly.offline import get_plotlyjs

        drawn = {"runs": values["runs"], **charts._asdict()}
        content = render_page(f"{template}.html", [get_plotlyjs(), read_source("report.js")], drawn=drawn, **values)
    write_file(out, content)


def data_url(picture: str) -> str:
    """An SVG picture as the address of an image inside a page."""
    return f"data:image/svg+xml;base64,{base64.b64encode(picture.encode()).decode()}"
