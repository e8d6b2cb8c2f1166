"""Write the tables of docs/results.md from the CSV files of docs/results/: ``python docs/make_results.py``.

Between ``<!-- COMPARISON/TABLE -->`` and its end stands a table of the comparison that lies in results/COMPARISON.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from avatarl.comparison.measures import read_rows
from avatarl.comparison.report import page_values
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
        return f"{place['begin']}\n{_table(records / place['comparison'], place['table'])}{place['end']}"

    return PLACE.sub(filled, text)


def _table(folder: Path, name: str) -> str:
    results, curves, tuning = (read_rows(folder / f"{rows}.csv") for rows in ("results", "curves", "tuning"))
    baseline = yaml.safe_load((folder / "comparison.yaml").read_text(encoding="utf-8"))["baseline"]
    return markdown_table(page_values(results, curves, tuning, baseline)[name])


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
