"""The tables and pictures of docs/results.md and docs/results/*/README.md are those of the CSV files beside them."""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS))

import make_results  # noqa: E402
import pytest  # noqa: E402

TABLES = ("outcome", "budgets", "quality", "costs", "tuning")
RECORDS = sorted(make_results.RECORDS.iterdir())


@pytest.mark.parametrize("page", make_results.pages(), ids=lambda page: str(page.relative_to(DOCS)))
def test_the_tables_are_those_of_the_records(page: Path):
    text = page.read_text(encoding="utf-8")
    assert make_results.with_tables(text) == text, "run `python docs/make_results.py`"


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
def test_each_record_has_a_page_with_all_its_tables(record: Path):
    text = (record / "README.md").read_text(encoding="utf-8")
    values = make_results.values_of(record)
    shown = [f"{place['comparison']}/{place['table']}" for place in make_results.PLACE.finditer(text)]
    assert shown == [f"{record.name}/{table}" for table in TABLES if values[table] is not None]
    assert f"(results/{record.name}/README.md)" in make_results.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
def test_the_pictures_are_those_of_the_records(record: Path):
    drawn = make_results.values_of(record)["picture"]
    assert (record / make_results.PICTURE).read_text(encoding="utf-8") == drawn, "run `python docs/make_results.py`"


def test_a_table_that_is_not_of_the_records_is_made_anew():
    text = make_results.PAGE.read_text(encoding="utf-8")
    place = make_results.PLACE.search(text)
    assert make_results.with_tables(text.replace(place[0], f"{place['begin']}\nmade up\n{place['end']}")) == text
