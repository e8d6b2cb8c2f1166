"""What a few seeds say of an arm against the baseline: paired differences, their interval, and p."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

CONFIDENCE = 0.95

BySeed = Mapping[int, float]


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

    def scaled(self, scale: float) -> Difference:
        """The same in another unit."""
        return self._replace(mean=self.mean * scale, lower=self.lower * scale, upper=self.upper * scale)


def by_seed(rows: pd.DataFrame, arm: str, name: str) -> dict[int, float]:
    """A column of one arm's rows, by seed. Seeds without a finite number are left out, as of runs that diverged."""
    if name not in rows:
        return {}
    of_arm = rows.loc[rows["arm"] == arm, ["seed", name]]
    numbers = dict(zip(of_arm["seed"], of_arm[name].astype(float), strict=True))
    return {seed: number for seed, number in numbers.items() if math.isfinite(number)}


def spread(values: BySeed) -> Spread | None:
    """Mean and standard deviation over seeds; None where there is nothing."""
    numbers = pd.Series(values, dtype=float)
    return Spread(float(numbers.mean()), float(numbers.std()), len(numbers)) if len(numbers) else None


def paired_difference(values: BySeed, baseline: BySeed) -> Difference | None:
    """``values`` minus ``baseline`` over the seeds that both have; None where there is no such seed.

    Initial weights and the order of the data are the same in both runs of a pair (unless the arm has other windows or
    another player), so that what a seed does to both is not in their difference.
    """
    pairs = np.array([values[seed] - baseline[seed] for seed in values if seed in baseline])
    if not len(pairs):
        return None
    mean = float(pairs.mean())
    if len(pairs) < 2:
        return Difference(mean, math.nan, math.nan, math.nan, 1)
    if pairs.std() == 0:  # equal to the last bit, or off by the same number in every pair
        return Difference(mean, mean, mean, float(mean == 0), len(pairs))
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # of pairs that hardly differ
        test = stats.ttest_1samp(pairs, 0.0)
    interval = test.confidence_interval(CONFIDENCE)
    return Difference(mean, float(interval.low), float(interval.high), float(test.pvalue), len(pairs))


def reached_within(curve: pd.DataFrame, cost: str, budget: float) -> float | None:
    """The lowest validation cross-entropy of a run until it had spent so much; None before its first evaluation.

    These are its evaluations within the budget and, where that ends between two, the straight line between them.

    Args:
        curve: The rows of one run, in order.
        cost: ``tokens``, ``flops``, ``all_flops`` or ``seconds``.
        budget: In the unit of that column.
    """
    costs, scores = curve[[cost, "cross_entropy"]].to_numpy(float).T
    within = scores[costs <= budget]
    if not len(within):
        return None
    return min(float(within.min()), float(np.interp(budget, costs, scores)))


def cost_to_reach(curve: pd.DataFrame, cost: str, cross_entropy: float) -> float | None:
    """What a run had spent when its validation cross-entropy first was this low, between two evaluations by a straight
    line; None where it never was."""
    scores, costs = curve["cross_entropy"].to_numpy(), curve[cost].to_numpy()
    low = np.flatnonzero(scores <= cross_entropy)
    if not len(low):
        return None
    first = low[0]
    # From the evaluation before, which was higher, down to the first that was so low.
    around = slice(max(first - 1, 0), first + 1)
    return float(np.interp(-cross_entropy, -scores[around], costs[around]))
