"""The picture of an outcome, by numbers that are known beforehand."""

from __future__ import annotations

import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from avatarl.comparison.picture import picture_of
from avatarl.comparison.report import PICTURE, draw, page_values, write_reports

from .rows import curve, result, write_small_comparison

SVG = "{http://www.w3.org/2000/svg}"


def results(**arms: list[float]) -> list[dict]:
    return [result(arm, seed, value) for arm, values in arms.items() for seed, value in enumerate(values)]


def per_cent(picture: dict, place: float) -> float:
    """What a place on the axis means, by its first and last tick."""
    (first, low), *_, (last, high) = picture["ticks"]
    low, high = (float(words.replace("−", "-").removesuffix(" %")) for words in (low, high))
    return low + (high - low) * (place - first) / (last - first)


def test_places_are_the_paired_differences_in_per_cent():
    """Pairs −2, −3 and −4 % of a mean of 5; half the 95 % interval is 4.303 · 1 / √3 = 2.484."""
    picture = picture_of(results(base=[5.0, 5.0, 5.0], better=[4.9, 4.85, 4.8], worse=[5.1, 5.1, 5.2]), "base")
    better, worse = picture["lines"]
    assert (better.name, better.text, better.verdict) == ("better", "−3.00 %, n = 3", "better")
    assert per_cent(picture, better.mean) == pytest.approx(-3, abs=0.02)
    assert [per_cent(picture, place) for place in better.seeds] == pytest.approx([-2, -3, -4], abs=0.02)
    assert [per_cent(picture, place) for place in better.interval] == pytest.approx([-5.484, -0.516], abs=0.02)
    assert (worse.text, worse.verdict, worse.beyond) == ("+2.67 %, n = 3", "", "")  # its interval holds zero
    assert per_cent(picture, picture["zero"]) == pytest.approx(0, abs=0.02)
    assert better.y < worse.y < picture["bottom"]


def test_what_is_far_from_all_others_does_not_squeeze_them():
    near = dict(a=[4.9, 4.91], b=[4.8, 4.81], c=[5.05, 5.04], d=[4.95, 4.94], e=[5.1, 5.12])
    arms = dict(base=[5.0, 5.0], **near, far=[9.0, 8.0])
    picture = picture_of(results(**arms), "base")
    beyond = {line.name: line.beyond for line in picture["lines"]}
    assert beyond == dict.fromkeys(near, "") | {"far": "right"}
    for line in picture["lines"]:
        for place in (line.mean, *line.seeds, *line.interval):
            assert picture["left"] <= place <= picture["right"]
    alone = picture_of(results(base=[5.0, 5.0], far=[9.0, 8.0]), "base")["lines"][0]
    assert alone.beyond == ""


def test_what_leaves_the_axis_is_marked():
    """Two pairs, 0.2 and 0.8 %: half the interval is 12.706 · 0.3 = 3.8, and one of 20 % is left out."""
    near = dict(a=[5.01, 5.04], b=[5.02, 5.03], c=[4.96, 4.97], d=[4.98, 4.99])
    picture = picture_of(results(base=[5.0, 5.0, 5.0], **near, far=[5.0, 5.05, 6.0]), "base")
    a, *_, far = picture["lines"]
    assert a.is_cut == (True, True) and a.interval == (picture["left"], picture["right"]) and a.beyond == ""
    assert far.is_cut == (True, True) and len(far.seeds) == 2 and far.beyond == "right"


def test_one_arm_that_does_something_among_many_that_do_not_is_on_the_axis():
    idle = {f"idle_{number}": [5.001, 4.999] for number in range(8)}
    picture = picture_of(results(base=[5.0, 5.0], **idle, winner=[4.8, 4.8]), "base")
    winner = picture["lines"][-1]
    assert winner.beyond == "" and per_cent(picture, winner.mean) == pytest.approx(-4, abs=0.05)


def test_numbers_without_end_are_left_out():
    picture = picture_of(results(base=[5.0, 5.0], a=[4.9, math.inf], b=[math.inf, math.inf]), "base")
    assert [(line.name, line.text) for line in picture["lines"]] == [("a", "−2.00 %, n = 1")]


def test_one_pair_has_no_interval_and_arms_without_a_pair_no_line():
    rows = [result("base", 1, 5.0), result("base", 2, 5.0), result("a", 1, 4.9), result("alone", 7, 4.0)]
    (line,) = picture_of(rows, "base")["lines"]
    assert (line.name, line.interval, line.text, line.verdict) == ("a", None, "−2.00 %, n = 1", "")


def test_without_anything_to_compare_there_is_no_picture(tmp_path: Path):
    assert picture_of(results(base=[5.0, 4.0]), "base") is None
    equal = picture_of(results(base=[5.0, 4.0], same=[5.0, 4.0]), "base")
    assert equal["lines"][0].mean == equal["zero"] and equal["ticks"]


def test_the_file_and_the_page_show_the_same(tmp_path: Path):
    folder = write_small_comparison(tmp_path)
    write_reports(folder, "cross_entropy")
    drawn = ElementTree.fromstring((folder / PICTURE).read_text(encoding="utf-8"))
    texts = [element.text for element in drawn.iter(f"{SVG}text")]
    assert "article" in texts and any(re.fullmatch(r"−\d+\.\d\d %, n = 2", text) for text in texts)
    page = (folder / "report.html").read_text(encoding="utf-8")
    shown = ElementTree.fromstring(re.search(r'<svg[^>]*class="outcome".*?</svg>', page, re.S)[0])
    assert [element.text for element in shown.iter("text")] == texts
    assert len(list(drawn.iter(f"{SVG}style"))) == 1 and not list(shown.iter("style"))
    assert f"]({PICTURE})" in (folder / "report.md").read_text(encoding="utf-8")


def test_names_are_text():
    rows = [result(arm, seed, 5.0 - seed) for arm in ("a", "<b>&\u202e") for seed in (1, 2)]
    values = page_values(rows, [line for row in rows for line in curve(row["arm"], row["seed"], [5.0])], [], "a")
    drawn = draw(values)
    assert "<b>" not in drawn and "\u202e" not in drawn
    assert any("<b>&\\u202e" in (element.text or "") for element in ElementTree.fromstring(drawn).iter(f"{SVG}text"))
