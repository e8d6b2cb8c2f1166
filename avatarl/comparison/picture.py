"""A comparison's outcome as one picture: how far each arm is from the baseline, in the mean and seed by seed."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .measures import Row
from .statistics import BySeed, Difference, by_seed, paired_difference, spread
from .tables import CROSS_ENTROPY, arms_of, signed, verdict

AXIS, TOP, LINE = 500, 40, 22  # pixels: the axis' width, what stands above the lines, the height of one
CHARACTER, MARGIN = 7.5, 24  # of a name, and beside it
FEW = 2  # pairs whose interval says little more than that they are few: it may go beyond the axis
FAR = 3.0  # times the upper quartile of all pairs' differences, beyond which an arm lies outside of the axis,
NEAR = 10.0  # if it is further than so many per cent
MOST_TICKS = 8


class Compared(NamedTuple):
    """One arm against the baseline, in per cent of the baseline's cross-entropy."""

    difference: Difference
    pairs: list[float]


@dataclass(frozen=True)
class Line:
    """One arm as it is drawn; places are pixels from the left.

    Attributes:
        verdict: ``better``, ``worse`` or nothing, by the 95 % interval.
        interval: Its ends, within the axis; ``is_cut`` says which of them lie beyond.
        seeds: Those of single pairs that lie within the axis.
        beyond: ``left`` or ``right`` where the mean lies outside of the axis.
    """

    name: str
    text: str
    verdict: str
    y: float
    mean: float
    interval: tuple[float, float] | None
    is_cut: tuple[bool, bool]
    seeds: tuple[float, ...]
    beyond: str


def picture_of(results: Sequence[Row], baseline: str) -> dict[str, Any] | None:
    """What the template ``outcome.svg`` draws, from rows of results.csv; None where nothing can be compared.

    A line of each arm: its paired difference to the baseline in per cent, the 95 % interval of the mean, each pair.
    """
    of_baseline = by_seed(results, baseline, CROSS_ENTROPY.name)
    found = {arm: _compared(by_seed(results, arm, CROSS_ENTROPY.name), of_baseline) for arm in arms_of(results)}
    compared = {arm: each for arm, each in found.items() if arm != baseline and each is not None}
    if not compared:
        return None
    lowest, highest = _range_of(compared.values())
    left = round(MARGIN + CHARACTER * max(map(len, compared)))

    def place(per_cent: float) -> float:
        inside = min(max(per_cent, lowest), highest)
        return round(left + AXIS * (inside - lowest) / (highest - lowest), 1)

    lines = []
    for number, (arm, (difference, pairs)) in enumerate(compared.items()):
        mean, lower, upper, _, count = difference
        lines.append(
            Line(
                name=arm,
                text=f"{signed(mean, 2)} %, n = {count}",
                verdict=verdict(difference, CROSS_ENTROPY),
                y=TOP + LINE * (number + 0.5),
                mean=place(mean),
                interval=None if math.isnan(lower) else (place(lower), place(upper)),
                is_cut=(lower < lowest, upper > highest),
                seeds=tuple(place(pair) for pair in pairs if lowest <= pair <= highest),
                beyond="left" if mean < lowest else "right" if mean > highest else "",
            )
        )
    return {
        "lines": lines,
        "ticks": [(place(tick), f"{signed(tick, digits)} %") for tick, digits in _ticks(lowest, highest)],
        "zero": place(0),
        "top": TOP,
        "bottom": TOP + LINE * len(lines),
        "left": left,
        "right": left + AXIS,
    }


def _compared(values: BySeed, of_baseline: BySeed) -> Compared | None:
    difference = paired_difference(values, of_baseline)
    if difference is None:
        return None
    paired = {seed: of_baseline[seed] for seed in values if seed in of_baseline}
    unit = spread(paired).mean / 100
    scaled = Difference(*(each / unit for each in difference[:3]), *difference[3:])
    return Compared(scaled, [(values[seed] - other) / unit for seed, other in paired.items()])


def _range_of(compared: Collection[Compared]) -> tuple[float, float]:
    """The ends of the axis in per cent: zero, the pairs and the intervals, without what lies far from all others."""
    every = np.abs([pair for each in compared for pair in each.pairs])
    limit = max(FAR * float(np.quantile(every, 0.75)), NEAR)
    shown = [0.0]
    for difference, pairs in compared:
        shown += pairs
        if difference.count > FEW:
            shown += [difference.lower, difference.upper]
    shown = [per_cent for per_cent in shown if abs(per_cent) <= limit]
    margin = 0.05 * (max(shown) - min(shown)) or 1.0
    return min(shown) - margin, max(shown) + margin


def _ticks(lowest: float, highest: float) -> list[tuple[float, int]]:
    """Round numbers within the axis, and to how many digits they are round."""
    rough = (highest - lowest) / MOST_TICKS
    power = math.floor(math.log10(rough))
    step = next(step for step in (10.0**power * factor for factor in (1, 2, 5, 10)) if step >= rough)
    digits = max(0, -math.floor(math.log10(step)))
    return [(number * step, digits) for number in range(math.ceil(lowest / step), math.floor(highest / step) + 1)]
