"""What can be said of an arm against the baseline from a few seeds: paired differences, their interval, and p."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95

BySeed = dict[int, float]


class Spread(NamedTuple):
    """A number over seeds."""

    mean: float
    deviation: float  # of the sample; NaN of one seed
    count: int


class Difference(NamedTuple):
    """An arm minus the baseline, seed by seed."""

    mean: float
    lower: float  # of the 95 % interval of the mean; NaN where there are fewer than two pairs
    upper: float
    p: float  # of Student's t test of the pairs, two-sided; NaN as above
    count: int  # of pairs


def by_seed(rows: Iterable[Mapping[str, Any]], arm: str, name: str) -> BySeed:
    """A column of one arm's rows, by seed; seeds without a finite number are left out, as of runs that diverged."""
    numbers = {row["seed"]: float(row[name]) for row in rows if row["arm"] == arm and row.get(name) is not None}
    return {seed: number for seed, number in numbers.items() if math.isfinite(number)}


def spread(values: Mapping[int, float]) -> Spread | None:
    """Mean and standard deviation over seeds; None where there is nothing."""
    if not values:
        return None
    numbers = np.array(list(values.values()))
    return Spread(float(numbers.mean()), float(numbers.std(ddof=1)) if len(numbers) > 1 else math.nan, len(numbers))


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """``values`` minus ``baseline`` over the seeds that both have; None where there is no such seed.

    Initial weights and the order of the data are the same in both runs of a pair (unless the arm has other windows or
    another player), so that what a seed does to both is not in their difference.
    """
    pairs = np.array([values[seed] - baseline[seed] for seed in values if seed in baseline])
    if not len(pairs):
        return None
    mean, count = float(pairs.mean()), len(pairs)
    if count < 2:
        return Difference(mean, math.nan, math.nan, math.nan, count)
    error = float(pairs.std(ddof=1)) / math.sqrt(count)
    if error == 0:  # equal to the last bit, or off by the same number in every pair
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 0.0, count)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, count - 1))
    return Difference(mean, mean - half, mean + half, p, count)


def reached_within(curve: Sequence[Mapping[str, Any]], cost: str, budget: float) -> float | None:
    """The lowest validation cross-entropy of a run until it had spent so much; None before its first evaluation.

    Looked at are its evaluations within the budget and, where that ends between two, the straight line between these.

    Args:
        curve: The rows of one run, in order.
        cost: ``tokens``, ``flops``, ``all_flops`` or ``seconds``.
    """
    known = [row for row in curve if row[cost] is not None]
    within = [row for row in known if row[cost] <= budget]
    if not within:
        return None
    scores = [row["cross_entropy"] for row in within]
    if len(within) < len(known):
        last, following = within[-1], known[len(within)]
        share = (budget - last[cost]) / (following[cost] - last[cost])
        scores.append(last["cross_entropy"] + share * (following["cross_entropy"] - last["cross_entropy"]))
    return min(scores)


def cost_to_reach(curve: Sequence[Mapping[str, Any]], cost: str, cross_entropy: float) -> float | None:
    """What a run had spent when its validation cross-entropy first was this low, between two evaluations by a straight
    line; None where it never was."""
    before = None
    for row in curve:
        if row["cross_entropy"] <= cross_entropy:
            if before is None:
                return row[cost]
            share = (before["cross_entropy"] - cross_entropy) / (before["cross_entropy"] - row["cross_entropy"])
            return before[cost] + share * (row[cost] - before[cost])
        before = row
    return None
