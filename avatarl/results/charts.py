"""Curves and reliability diagrams of runs, at most some hundred points of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from .reporter import Charts, line_chart, six_digits
from .runs import EVENTS, Run

MOST_POINTS = 1000  # of a curve: more than a screen shows side by side
# What is drawn: event, metric, title, unit, note.
CURVES = (
    ("eval", "cross_entropy", "Validation cross-entropy", "nats per token", ""),
    ("train", "cross_entropy", "Training cross-entropy", "nats per token", ""),
    ("train", "loss", "Training loss", "each objective's own", "Losses of different objectives do not compare."),
    ("train", "expected_reward", "Expected reward", "reward under the policy", ""),
    ("train", "expected_reward_share", "Expected reward share", "share of the best possible", ""),
    ("train", "other_reward_share", "Reward on other tokens", "share of the reward", ""),
    ("train", "entropy", "Entropy of the policy", "nats", ""),
    ("train", "grad_norm", "Gradient norm", "L2 norm before clipping", ""),
    ("train", "tokens_per_second", "Throughput", "tokens per second", ""),
)
# What the charts need of a run's lines.
CHARTED = tuple(dict.fromkeys([*(metric for _, metric, *_ in CURVES), "player_flops", "critic_flops", "skipped_steps"]))
RELIABILITY = (  # metric, title, scale, note
    ("reliability", "The most likely token", "linear", "Bins of few tokens jump; point at a bin to see its n."),
    (
        "top16_reliability",
        "The 16 most likely tokens",
        "log",
        "Logarithmic, so bins in which nothing came true are not shown.",
    ),
)


def charts_of(runs: Sequence[Run], evaluations: Mapping[int, Mapping[str, Any]] | None = None) -> Charts:
    """The curves of runs that any of them has points in, and the reliability diagrams of evaluations by run number."""
    axes = {event: [_places(getattr(run, event)) for run in runs] for event in EVENTS}
    charts = []
    for event, metric, title, unit, note in CURVES:
        values = {number: _values(getattr(run, event), event, metric) for number, run in enumerate(runs)}
        if lines := {number: each for number, each in values.items() if np.isfinite(each).any()}:
            charts.append(line_chart(event, metric, title, unit, lines, note))
    return Charts(axes, charts, _reliability(evaluations) if evaluations else [])


def _reliability(evaluations: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
    charts = []
    for metric, title, scale, note in RELIABILITY:
        series = []
        for number, evaluation in evaluations.items():
            bins = pd.DataFrame(evaluation[metric], columns=["confidence", "accuracy", "count"])
            if scale == "log":
                bins = bins[(bins[["confidence", "accuracy"]] > 0).all(axis=1)]
            x, y = six_digits(bins["confidence"]), six_digits(bins["accuracy"])
            series.append({"run": number, "x": x, "y": y, "count": bins["count"].tolist()})
        charts.append(dict(id=metric, metric=metric, title=title, scale=scale, note=note, series=series))
    return charts


def _values(lines: pd.DataFrame, event: str, metric: str) -> np.ndarray:
    values, weights = lines[metric].to_numpy(), np.ones(len(lines))
    if metric == "tokens_per_second":
        # Averaged over tokens are the seconds that each of them takes.
        with np.errstate(divide="ignore"):
            seconds = np.where(np.isinf(values), values, 1 / values)
            return 1 / stretch_means(seconds, _since(lines["tokens"]))
    if event == "train":
        weights = _since(lines["step"] - lines["skipped_steps"].fillna(0).replace(np.inf, 0))
    return stretch_means(values, weights)


def _places(lines: pd.DataFrame) -> dict[str, list[float | None] | None]:
    """Where the points of a run lie on each axis: each stretch of lines stands at its last one."""
    last = lines.iloc[_bounds(len(lines))[1:] - 1]
    flops = last["player_flops"] + last["critic_flops"]
    return {
        "tokens": last["tokens"].astype(int).tolist(),
        "flops": six_digits(flops) if np.isfinite(flops).any() else None,
    }


def stretch_means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Means over at most ``MOST_POINTS`` stretches of lines: what a run that logs less often would have logged.

    Args:
        values: (L,) NaN for a line without a value, which counts for nothing; infinity for a value that is not finite.
        weights: (L,) steps that a line is the mean of.

    Returns:
        (stretches,) NaN for a stretch without any value, or with one that is not finite.
    """
    if len(values) <= MOST_POINTS:
        return np.where(np.isfinite(values), values, np.nan)
    starts = _bounds(len(values))[:-1]
    is_known = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        sums = np.add.reduceat(np.where(is_known, values * weights, 0.0), starts)
        means = sums / np.add.reduceat(np.where(is_known, weights, 0.0), starts)
    return np.where(np.isfinite(means), means, np.nan)


def _bounds(lines: int) -> np.ndarray:
    """Where stretches of lines begin and the last one ends, int64 (stretches + 1,)."""
    stretches = max(1, min(lines, MOST_POINTS))
    return np.arange(min(lines, stretches) + 1) * lines // stretches


def _since(so_far: pd.Series) -> np.ndarray:
    """What each line adds to what was counted so far; (L,) → (L,)."""
    return np.diff(so_far, prepend=0)
