"""Write the tables and pictures of docs/results.md and docs/results/*/README.md from the CSV files of docs/results/.

Run ``python docs/make_results.py``. It fills each pair of marks ``<!-- COMPARISON/TABLE -->`` and
``<!-- /COMPARISON/TABLE -->`` with that table of the comparison in results/COMPARISON, and draws
results/COMPARISON/outcome.svg.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from avatarl.comparison.measures import read_rows
from avatarl.comparison.report import PICTURE, page_values
from avatarl.results.pages import markdown_table

HERE = Path(__file__).parent
PAGE, RECORDS = HERE / "results.md", HERE / "results"
PLACE = re.compile(
    r"(?P<begin><!-- (?P<comparison>[\w-]+)/(?P<table>\w+) -->).*?(?P<end><!-- /(?P=comparison)/(?P=table) -->)",
    re.DOTALL,
)


def with_tables(text: str, records: Path = RECORDS) -> str:
    """Return ``text`` with the table between each pair of marks written again from the records."""

    def filled(place: re.Match) -> str:
        table = markdown_table(values_of(records / place["comparison"])[place["table"]])
        return f"{place['begin']}\n{table}{place['end']}"

    return PLACE.sub(filled, text)


def pages() -> list[Path]:
    """List the pages that have tables: the findings, then one page for each comparison."""
    return [PAGE, *sorted(RECORDS.glob("*/README.md"))]


@cache
def values_of(folder: Path) -> dict[str, Any]:
    """Return the values that a report of the comparison in ``folder`` shows, its tables among them."""
    results, curves, tuning = (read_rows(folder / f"{rows}.csv") for rows in ("results", "curves", "tuning"))
    baseline = yaml.safe_load((folder / "comparison.yaml").read_text(encoding="utf-8"))["baseline"]
    return page_values(results, curves, tuning, baseline)


if __name__ == "__main__":
    for page in pages():
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    for table in RECORDS.glob("*/results.csv"):
        (table.parent / PICTURE).write_text(values_of(table.parent)["picture"], encoding="utf-8")
