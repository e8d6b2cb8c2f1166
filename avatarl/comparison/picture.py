"""A comparison's outcome as one picture: how far each arm is from the baseline, in the mean and seed by seed."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .measures import Row
from .statistics import Difference, by_seed, paired_difference, spread
from .tables import CROSS_ENTROPY, arms_of, signed, verdict

LEFT, RIGHT = 190, 690  # of the axis, in pixels; names stand left of it, numbers right
TOP, LINE = 40, 22
FEW = 2  # pairs whose interval says little more than that they are few: it may go beyond the axis
FAR = 3.0  # times the upper quartile of all pairs' differences, beyond which an arm lies outside of the axis
MOST_TICKS = 8


@dataclass(frozen=True)
class Line:
    """One arm; places are pixels from the left, within the axis."""

    name: str
    text: str  # its difference, in per cent of the baseline's cross-entropy, and of how many pairs
    verdict: str  # better, worse or nothing, by the 95 % interval
    y: float
    mean: float
    interval: tuple[float, float] | None
    seeds: tuple[float, ...]
    beyond: str  # left or right where the mean lies outside of the axis


def picture_of(results: Sequence[Row], baseline: str) -> dict[str, Any] | None:
    """What the template ``outcome.svg`` draws, from rows of results.csv; None where nothing can be compared.

    A line of each arm: its paired difference to the baseline in per cent, the 95 % interval of the mean, each pair.
    """
    of_baseline, compared = by_seed(results, baseline, CROSS_ENTROPY.name), {}
    for arm in arms_of(results):
        values = by_seed(results, arm, CROSS_ENTROPY.name)
        difference = paired_difference(values, of_baseline)
        if arm != baseline and difference is not None:
            paired = {seed: of_baseline[seed] for seed in values if seed in of_baseline}
            unit = spread(paired).mean / 100
            pairs = [(values[seed] - other) / unit for seed, other in paired.items()]
            compared[arm] = difference, unit, pairs
    if not compared:
        return None
    lowest, highest = _range_of(compared.values())

    def place(per_cent: float) -> float:
        inside = min(max(per_cent, lowest), highest)
        return round(LEFT + (RIGHT - LEFT) * (inside - lowest) / (highest - lowest), 1)

    lines = []
    for number, (arm, (difference, unit, pairs)) in enumerate(compared.items()):
        mean = difference.mean / unit
        has_interval = not math.isnan(difference.lower)
        lines.append(
            Line(
                name=arm,
                text=f"{signed(mean, 2)} %, n = {difference.count}",
                verdict=verdict(difference, CROSS_ENTROPY),
                y=TOP + LINE * (number + 0.5),
                mean=place(mean),
                interval=(place(difference.lower / unit), place(difference.upper / unit)) if has_interval else None,
                seeds=tuple(place(pair) for pair in pairs),
                beyond="left" if mean < lowest else "right" if mean > highest else "",
            )
        )
    ticks = [(place(tick), f"{signed(tick, digits)} %") for tick, digits in _ticks(lowest, highest)]
    bottom = TOP + LINE * len(lines)
    return {
        "lines": lines,
        "ticks": ticks,
        "zero": place(0),
        "top": TOP,
        "bottom": bottom,
        "left": LEFT,
        "right": RIGHT,
    }


def _range_of(compared: Collection[tuple[Difference, float, list[float]]]) -> tuple[float, float]:
    """The ends of the axis in per cent: zero, the pairs and the intervals, without what lies far from all others."""
    every = np.abs([pair for _, _, pairs in compared for pair in pairs])
    limit = FAR * float(np.quantile(every, 0.75))
    shown = [0.0]
    for difference, unit, pairs in compared:
        shown += pairs
        if difference.count > FEW:
            shown += [difference.lower / unit, difference.upper / unit]
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
