"""Pictures of runs and of differences: what they name, and that names are text."""

from __future__ import annotations

import math
import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest

from avatarl import UserError
from avatarl.results import draw_curves
from avatarl.results.pictures import Interval, interval_chart

from .reports import write_run
from .test_runs import made_up_run

PNG = b"\x89PNG\r\n\x1a\n"
SVG = "{http://www.w3.org/2000/svg}"

# --- curves ---------------------------------------------------------------------------------------------------------


def test_a_picture_is_drawn(tmp_path: Path):
    runs = {"one": made_up_run(tmp_path / "a", 5.0), "two": made_up_run(tmp_path / "b", 6.0)}
    draw_curves(runs, tmp_path / "curves.png", {"unigram entropy": 4.0})
    content = (tmp_path / "curves.png").read_bytes()
    assert content.startswith(PNG)
    empty = {"none": write_run(tmp_path / "c", [])}
    draw_curves(empty, tmp_path / "empty.png")
    assert len(content) > 1.2 * len((tmp_path / "empty.png").read_bytes())


def test_the_picture_names_every_run_and_baseline(tmp_path: Path):
    """SVG writes each text beside its shape as a comment; six runs are more than there are colours."""
    names = ["first", "second", "third", "fourth", "fifth", "sixth"]
    runs = {name: made_up_run(tmp_path / name, 5.0 + number) for number, name in enumerate(names)}
    draw_curves(runs, tmp_path / "curves.svg", {"unigram entropy": 4.0})
    picture = (tmp_path / "curves.svg").read_text()
    # Validation, training loss and expected reward; no run has the fourth panel's metric.
    assert {name: picture.count(f"<!-- {name} -->") for name in names} == dict.fromkeys(names, 3)
    assert picture.count("<!-- unigram entropy -->") == 1
    assert "<!-- validation cross-entropy (nats per token) -->" in picture


def test_the_callers_backend_is_left_alone(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "backend", "svg")
    draw_curves({"run": made_up_run(tmp_path / "run", 5.0)}, tmp_path / "curves.png")
    assert matplotlib.rcParams["backend"] == "svg"


def test_a_folder_without_metrics_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="has no metrics.jsonl that is a regular file; expected a run folder"):
        draw_curves({"run": tmp_path}, tmp_path / "curves.png")


# --- intervals ------------------------------------------------------------------------------------------------------


def texts_of(picture: str) -> list[str]:
    return [element.text for element in ElementTree.fromstring(picture).iter(f"{SVG}text")]


def markers_of(picture: str) -> int:
    return len(list(ElementTree.fromstring(picture).iter(f"{SVG}use")))


INTERVALS = [
    Interval("$a_b$", -2.0, -3.0, -1.0, [-2.5, -1.5], "−2 %, n = 2", "better"),
    Interval("<b>&\u202e", 1.0, math.nan, math.nan, [1.0], "+1 %, n = 1"),
]


def test_an_interval_chart_names_its_lines_and_names_are_text():
    picture = interval_chart(INTERVALS, (-5, 5), "difference", " %")
    texts = texts_of(picture)
    assert texts[-5:] == ["$a_b$", "<b>&\\u202e", "−2 %, n = 2", "+1 %, n = 1", "difference"]
    assert {"−4 %", "0 %", "+4 %"} <= set(texts)
    assert picture == interval_chart(INTERVALS, (-5, 5), "difference", " %")  # the same bytes each time


def test_colours_are_those_of_the_readers_scheme():
    picture = interval_chart(INTERVALS, (-5, 5), "difference")
    assert "prefers-color-scheme: dark" in picture
    drawn = re.sub("<style>.*?</style>", "", picture, flags=re.DOTALL)
    assert set(re.findall(r"var\(--(\w+)\)", drawn)) == {"ground", "ink", "quiet", "line", "better"}
    assert not re.findall("#[0-9a-f]{6}", drawn)


@pytest.mark.parametrize(
    ("limits", "arrows"), [((-5, 5), 0), ((-2.2, 5), 1), ((-2.2, -1.2), 2)], ids=["inside", "left", "both sides"]
)
def test_what_lies_beyond_the_axis_has_an_arrow(limits: tuple[float, float], arrows: int):
    """A mean and two single points are drawn, of which a point beyond the axis is left out."""
    (line,) = INTERVALS[:1]
    inside = [point for point in line.points if limits[0] <= point <= limits[1]]
    assert markers_of(interval_chart([line], limits, "difference")) == 1 + len(inside) + arrows
