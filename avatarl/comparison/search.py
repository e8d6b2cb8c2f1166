"""The search for an arm's settings: one setting at a time along a grid, until no neighbour on its lines is better."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Point = tuple[Any, ...]  # a value for each setting of the grid, in its order


def middle(grid: Mapping[str, Sequence[Any]]) -> Point:
    """Where a search begins."""
    return tuple(values[(len(values) - 1) // 2] for values in grid.values())


def search(grid: Mapping[str, Sequence[Any]], score: Callable[[Point], float | None]) -> Point | None:
    """Coordinate descent from the middle of the grid.

    All values of one setting are tried with the others held, the best is kept, and so on with the next setting, round
    and round until a whole round changes nothing: the result is the best point on every line through it.

    Args:
        score: A point's score, less is better; None where it is not known yet. Every point of a line is asked for
            before any is needed, so that what is not known can be found side by side.

    Returns:
        The best point; None where a score is missing.
    """
    point = middle(grid)
    while True:
        before = point
        for place, values in enumerate(grid.values()):
            line = [(*point[:place], value, *point[place + 1 :]) for value in values]
            scores = [score(candidate) for candidate in line]
            if None in scores:
                return None
            best = min(scores)
            if score(point) != best:  # of equals the one that is held stays
                point = line[scores.index(best)]
        if point == before:
            return point
