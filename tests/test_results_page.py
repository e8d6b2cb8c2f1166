"""The tables and pictures of docs/results.md are those of the CSV files beside it."""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS))

import make_results  # noqa: E402
import pytest  # noqa: E402


def test_the_tables_are_those_of_the_records():
    text = make_results.PAGE.read_text(encoding="utf-8")
    places = [f"{place['comparison']}/{place['table']}" for place in make_results.PLACE.finditer(text)]
    assert {folder.name for folder in make_results.RECORDS.iterdir()} == {place.split("/")[0] for place in places}
    assert make_results.with_tables(text) == text, "run `python docs/make_results.py`"


@pytest.mark.parametrize("record", sorted(make_results.RECORDS.iterdir()), ids=lambda record: record.name)
def test_the_pictures_are_those_of_the_records(record: Path):
    drawn = make_results.values_of(record)["picture"]
    assert (record / make_results.PICTURE).read_text(encoding="utf-8") == drawn, "run `python docs/make_results.py`"


def test_a_table_that_is_not_of_the_records_is_made_anew():
    text = make_results.PAGE.read_text(encoding="utf-8")
    place = make_results.PLACE.search(text)
    assert make_results.with_tables(text.replace(place[0], f"{place['begin']}\nmade up\n{place['end']}")) == text
