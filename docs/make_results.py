"""Write the tables of docs/results.md and the pictures beside it from the CSV files of docs/results/.

``python docs/make_results.py``. Between ``<!-- COMPARISON/TABLE -->`` and its end stands a table of the comparison that
lies in results/COMPARISON; its picture is results/COMPARISON/outcome.svg.
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
    """``text`` with every table made anew."""

    def filled(place: re.Match) -> str:
        table = markdown_table(values_of(records / place["comparison"])[place["table"]])
        return f"{place['begin']}\n{table}{place['end']}"

    return PLACE.sub(filled, text)


@cache
def values_of(folder: Path) -> dict[str, Any]:
    """What a report of the comparison in ``folder`` shows."""
    results, curves, tuning = (read_rows(folder / f"{rows}.csv") for rows in ("results", "curves", "tuning"))
    baseline = yaml.safe_load((folder / "comparison.yaml").read_text(encoding="utf-8"))["baseline"]
    return page_values(results, curves, tuning, baseline)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    for table in RECORDS.glob("*/results.csv"):
        (table.parent / PICTURE).write_text(values_of(table.parent)["picture"], encoding="utf-8")
