"""A comparison's outcome as one picture: how far each arm is from the baseline, in the mean and seed by seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from avatarl.results.pictures import Interval, interval_chart
from avatarl.results.reporter import signed

from .statistics import by_seed, paired_difference
from .tables import CROSS_ENTROPY, arms_of, verdict

FEW = 2  # pairs whose interval says little more than that they are few: it may leave the axis
FAR = 3.0  # times the upper quartile of all pairs' differences, beyond which an arm lies outside of the axis,
NEAR = 10.0  # if it is further than so many per cent


def outcome_picture(results: pd.DataFrame, baseline: str) -> str | None:
    """Draw the paired differences in cross-entropy as SVG text; None where nothing can be compared."""
    intervals = intervals_of(results, baseline)
    if not intervals:
        return None
    title = f"← lower loss than {baseline} · line: 95 % interval of the mean · dots: seeds · arrows: beyond the axis"
    return interval_chart(intervals, limits_of(intervals), title, unit=" %")


def intervals_of(results: pd.DataFrame, baseline: str) -> list[Interval]:
    """Each arm's paired difference in per cent of the baseline's cross-entropy, with each pair's."""
    of_baseline, found = by_seed(results, baseline, CROSS_ENTROPY.name), []
    for arm in arms_of(results):
        values = by_seed(results, arm, CROSS_ENTROPY.name)
        difference = paired_difference(values, of_baseline)
        if arm == baseline or difference is None:
            continue
        seeds = [seed for seed in values if seed in of_baseline]
        per_cent = 100 / np.mean([of_baseline[seed] for seed in seeds])
        mean, lower, upper, _, count = difference.scaled(per_cent)
        points = [(values[seed] - of_baseline[seed]) * per_cent for seed in seeds]
        text = f"{signed(mean, 2)} %, n = {count}"
        found.append(Interval(arm, mean, lower, upper, points, text, verdict(difference, CROSS_ENTROPY)))
    return found


def limits_of(intervals: Sequence[Interval]) -> tuple[float, float]:
    """The ends of the axis: zero, pairs and intervals lie between them, without what is far from all others."""
    pairs = np.concatenate([each.points for each in intervals])
    limit = max(FAR * float(np.quantile(np.abs(pairs), 0.75)), NEAR)
    ends = [(each.lower, each.upper) for each in intervals if len(each.points) > FEW]
    shown = np.array([0.0, *pairs, *np.ravel(ends)])
    shown = shown[np.abs(shown) <= limit]
    margin = 0.05 * float(np.ptp(shown)) or 1.0
    return float(shown.min()) - margin, float(shown.max()) + margin
