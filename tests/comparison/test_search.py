"""The search along a grid: what it finds, what it asks for and when, and that it ends."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from avatarl.comparison.search import Point, search

GRIDS = [
    {"a": [1, 2, 3, 4, 5]},
    {"a": [1, 2, 3, 4], "b": [0.1, 0.2, 0.3]},
    {"a": [1, 2, 3], "b": ["x", "y"], "c": [0.1, 0.2, 0.3, 0.4, 0.5]},
]


def lines_through(grid: dict[str, list], point: Point) -> list[list[Point]]:
    return [[(*point[:i], value, *point[i + 1 :]) for value in values] for i, values in enumerate(grid.values())]


def ended(grid: dict[str, list], scores: dict[Point, float]) -> Point:
    """What the search finds; an error where it asks on and on."""
    asked = itertools.count()

    def score(point: Point) -> float:
        assert next(asked) < 10_000, "it does not end"
        return scores[point]

    return search(grid, score)


@pytest.mark.parametrize("grid", GRIDS, ids=["one", "two", "three"])
def test_the_minimum_of_a_separable_function_is_found_wherever_it_lies(grid: dict[str, list]):
    for least in itertools.product(*grid.values()):
        places = [values.index(value) for values, value in zip(grid.values(), least, strict=True)]

        def score(point: Point, places=places) -> float:
            found = (values.index(value) for values, value in zip(grid.values(), point, strict=True))
            return sum((here - there) ** 2 for here, there in zip(found, places, strict=True))

        assert search(grid, score) == least


def test_settings_that_depend_on_each_other_take_more_than_one_round():
    grid, values = {"a": [1, 2, 3], "b": [1, 2, 3]}, iter(range(9))
    scores = {point: 10.0 for point in itertools.product(*grid.values())}
    scores |= {point: 8.0 - next(values) for point in [(2, 2), (1, 2), (1, 3), (3, 3)]}
    assert ended(grid, scores) == (3, 3)


@pytest.mark.parametrize("grid", GRIDS, ids=["one", "two", "three"])
def test_whole_lines_are_asked_before_any_score_is_needed(grid: dict[str, list]):
    rng, known = random.Random(5), {}
    for look in itertools.count():
        assert look < 100
        asked: list[Point] = []

        def score(point: Point, asked=asked) -> float | None:
            asked.append(point)
            return known.get(point)

        found = search(grid, score)
        new = {point for point in asked if point not in known}
        if found is not None:
            assert not new
            break
        if look == 0:
            middle = tuple(values[(len(values) - 1) // 2] for values in grid.values())
            assert asked == lines_through(grid, middle)[0]
        held = asked[-1]
        assert any(new <= set(line) <= set(asked) for line in lines_through(grid, held)), "a part of a line"
        known.update({point: rng.random() for point in new})
    assert look >= len(grid)


def test_one_missing_score_is_enough_to_wait_for_the_whole_line():
    asked: list[Point] = []

    def score(point: Point) -> float | None:
        asked.append(point)
        return None if point == (1,) else 0.0

    assert search({"a": [1, 2, 3]}, score) is None
    assert asked == [(1,), (2,), (3,)]


@pytest.mark.parametrize("possible", [range(1000), range(3), [1.0, math.inf]], ids=["distinct", "ties", "diverged"])
def test_the_result_is_the_best_on_every_line_through_it(possible):
    rng = random.Random(11)
    for _ in range(100):
        grid = {name: list(range(rng.randint(1, 5))) for name in "abc"[: rng.randint(1, 3)]}
        scores = {point: rng.choice(possible) for point in itertools.product(*grid.values())}
        found = ended(grid, scores)
        for line in lines_through(grid, found):
            assert scores[found] == min(scores[point] for point in line)


@pytest.mark.parametrize("all_of_them", [1.0, math.inf])
def test_of_equals_the_one_that_is_held_stays(all_of_them: float):
    grid = {"a": [1, 2, 3], "b": [1, 2, 3, 4]}
    assert ended(grid, {point: all_of_them for point in itertools.product(*grid.values())}) == (2, 2)


def test_a_diverged_start_is_left():
    scores = {(1,): math.inf, (2,): math.inf, (3,): 5.0}
    assert ended({"a": [1, 2, 3]}, scores) == (3,)
