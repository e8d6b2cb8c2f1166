"""The picture of an outcome, by numbers that are known beforehand."""

from __future__ import annotations

import base64
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest

from avatarl.comparison.picture import intervals_of, limits_of, outcome_picture
from avatarl.comparison.report import PICTURE, write_reports

from .rows import frame, result, write_small_comparison

SVG = "{http://www.w3.org/2000/svg}"


def results(**arms: list[float]) -> pd.DataFrame:
    return frame([result(arm, seed, value) for arm, values in arms.items() for seed, value in enumerate(values)])


def test_intervals_are_the_paired_differences_in_per_cent():
    """Pairs −2, −3 and −4 % of a mean of 5; half the 95 % interval is 4.303 · 1 / √3 = 2.484."""
    rows = results(base=[5.0, 5.0, 5.0], better=[4.9, 4.85, 4.8], worse=[5.1, 5.1, 5.2])
    better, worse = intervals_of(rows, "base")
    assert (better.name, better.text, better.verdict) == ("better", "−3.00 %, n = 3", "better")
    assert better.mean == pytest.approx(-3) and better.points == pytest.approx([-2, -3, -4])
    assert (better.lower, better.upper) == pytest.approx((-5.484, -0.516), abs=1e-3)
    assert (worse.text, worse.verdict) == ("+2.67 %, n = 3", "")  # its interval holds zero
    low, high = limits_of([better, worse])
    assert low < -5.484 and worse.upper < high < 6.2


NEAR = dict(a=[4.9, 4.91], b=[4.8, 4.81], c=[5.05, 5.04], d=[4.95, 4.94], e=[5.1, 5.12])
IDLE = {f"idle_{number}": [5.001, 4.999] for number in range(8)}


@pytest.mark.parametrize(
    ("arms", "low", "high"),
    [
        (dict(**NEAR, far=[9.0, 8.0]), -4.4, 2.8),  # what is far from all others does not squeeze them
        (dict(far=[9.0, 8.0]), -4, 84),  # unless it is the only one
        (dict(**IDLE, winner=[4.8, 4.8]), -4.3, 0.3),  # one arm that does something is on the axis
        (dict(same=[5.0, 5.0]), -1, 1),
        (dict(wide=[5.01, 5.04]), -0.04, 0.84),  # the interval of two pairs, 0.5 ± 3.8, leaves the axis
        (dict(wide=[5.01, 5.04, 5.0]), -0.8, 1.47),  # that of three, 0.33 ± 1.03, does not
    ],
)
def test_the_axis_holds_what_is_near(arms: dict, low: float, high: float):
    found = limits_of(intervals_of(results(base=[5.0, 5.0, 5.0], **arms), "base"))
    assert found == pytest.approx((low, high), abs=0.1)


@pytest.mark.parametrize(
    ("rows", "lines"),
    [
        # Numbers without end are left out, and one pair has no interval.
        (results(base=[5.0, 5.0], a=[4.9, math.inf], b=[math.inf, math.inf]), [("a", "−2.00 %, n = 1")]),
        (results(base=[5.0, 5.0], a=[4.9]), [("a", "−2.00 %, n = 1")]),
        (frame([result("base", 1, 5.0), result("a", 1, 4.9), result("alone", 7, 4.0)]), [("a", "−2.00 %, n = 1")]),
        (results(base=[5.0, 4.0]), []),
    ],
)
def test_what_has_no_pair_has_no_line(rows: pd.DataFrame, lines: list[tuple[str, str]]):
    found = intervals_of(rows, "base")
    assert [(each.name, each.text) for each in found] == lines
    assert all(math.isnan(each.lower) and not each.verdict for each in found)
    assert (outcome_picture(rows, "base") is None) == (not lines)


def test_the_file_and_the_page_show_the_same(tmp_path: Path):
    folder = write_small_comparison(tmp_path)
    write_reports(folder, "cross_entropy")
    picture = (folder / PICTURE).read_text(encoding="utf-8")
    texts = [element.text for element in ElementTree.fromstring(picture).iter(f"{SVG}text")]
    assert "article" in texts and any(re.fullmatch(r"−\d+\.\d\d %, n = 2", text) for text in texts)
    page = (folder / "report.html").read_text(encoding="utf-8")
    shown = re.search(r'<img class="outcome" [^>]*src="data:image/svg\+xml;base64,([^"]+)"', page)[1]
    assert base64.b64decode(shown).decode() == picture
    assert f"]({PICTURE})" in (folder / "report.md").read_text(encoding="utf-8")


def test_names_are_text():
    rows = frame([result(arm, seed, 5.0 - seed) for arm in ("a", "<b>&\u202e $x$") for seed in (1, 2)])
    drawn = outcome_picture(rows, "a")
    assert "<b>" not in drawn and "\u202e" not in drawn
    assert any("<b>&\\u202e $x$" in (text.text or "") for text in ElementTree.fromstring(drawn).iter(f"{SVG}text"))
