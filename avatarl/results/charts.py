"""Curves of several runs as a page draws them: which there are, and at most some hundred points of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .runs import EVENTS, Run

MOST_POINTS = 1000  # of a curve: more than a screen shows side by side
AXES = ("tokens", "flops")


class Chart(NamedTuple):
    """One metric over training, for every run that logs it."""

    event: str  # whose lines it is in, of EVENTS
    metric: str
    title: str
    unit: str
    note: str = ""


CHARTS = (
    Chart("eval", "cross_entropy", "Validation cross-entropy", "nats per token"),
    Chart("train", "cross_entropy", "Training cross-entropy", "nats per token"),
    Chart("train", "loss", "Training loss", "each objective's own", "Losses of different objectives do not compare."),
    Chart("train", "expected_reward", "Expected reward", "reward under the policy"),
    Chart("train", "expected_reward_share", "Expected reward share", "share of the best possible"),
    Chart("train", "other_reward_share", "Reward on other tokens", "share of the reward"),
    Chart("train", "entropy", "Entropy of the policy", "nats"),
    Chart("train", "grad_norm", "Gradient norm", "L2 norm before clipping"),
    Chart("train", "tokens_per_second", "Throughput", "tokens per second"),
)
# What the charts need of a run's lines.
CHARTED = tuple(dict.fromkeys([*(chart.metric for chart in CHARTS), "player_flops", "critic_flops", "skipped_steps"]))


# How a run is told from others besides by its colour: dashes in pixels, and a marker by plotly's name for it with its
# outline around (20, 6) in a drawn sample of the line.
DASHES = ("", "8px,4px", "2px,4px", "9px,4px,2px,4px", "16px,5px", "16px,4px,2px,4px,2px,4px")
MARKERS = {
    "circle": "M16 6a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "square": "M16.5 2.5h7v7h-7z",
    "diamond": "M20 1l5 5-5 5-5-5z",
    "triangle-up": "M20 1.5l4.5 8h-9z",
    "cross": "M18.5 1.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
    "triangle-down": "M20 10.5l4.5-8h-9z",
}
COLOURS = 6  # --run0 to --run5 of page.css


class Style(NamedTuple):
    """What a run's lines look like; no two of 36 runs look the same."""

    colour: int
    dash: str
    marker: str
    outline: str

    @classmethod
    def of(cls, run: int) -> Style:
        shifted = (run + run // COLOURS) % COLOURS
        marker, outline = list(MARKERS.items())[shifted]
        return cls(run % COLOURS, DASHES[shifted], marker, outline)


def chart_data(runs: Sequence[Run]) -> dict[str, Any]:
    """The curves of ``runs`` as JSON has them; None is a gap.

    Returns:
        ``axes``: for each event and run the points' places on each of ``AXES`` (None for FLOPs that were not logged);
        ``charts``: those that any run has points in, each with its ``series``, a run's number and its values.
    """
    axes = {event: [_places(run, event) for run in runs] for event in EVENTS}
    charts = []
    for chart in CHARTS:
        values = [_values(run, chart) for run in runs]
        series = [{"run": number, "y": y} for number, y in enumerate(values) if any(v is not None for v in y)]
        if series:
            charts.append({**chart._asdict(), "id": f"{chart.event}-{chart.metric}", "series": series})
    return {"axes": axes, "charts": charts}


def reliability_data(evaluations: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The reliability diagrams of evaluated runs (number → evaluation), as :func:`chart_data` has its charts."""
    kinds = (
        ("reliability", "The most likely token", "linear", "Bins of few tokens jump; what is pointed at shows n."),
        (
            "top16_reliability",
            "The 16 most likely tokens",
            "log",
            "Logarithmic; bins in which nothing came true have no place on it.",
        ),
    )
    charts = []
    for metric, title, scale, note in kinds if evaluations else ():
        series = []
        for number, evaluation in evaluations.items():
            rows = [row for row in evaluation[metric] if scale == "linear" or row["accuracy"] > 0 < row["confidence"]]
            columns = {name: [_six_digits(row[key]) for row in rows] for name, key in _RELIABILITY_COLUMNS.items()}
            series.append({"run": number, **columns})
        charts.append({"id": metric, "metric": metric, "title": title, "scale": scale, "note": note, "series": series})
    return charts


_RELIABILITY_COLUMNS = {"x": "confidence", "y": "accuracy", "count": "count"}


def _values(run: Run, chart: Chart) -> list[float | None]:
    columns = getattr(run, chart.event)
    values, weights = columns[chart.metric], np.ones(len(columns["step"]))
    if chart.metric == "tokens_per_second":
        # So many tokens in so many seconds: what can be averaged over tokens is the seconds that one of them takes.
        with np.errstate(divide="ignore"):
            seconds = np.where(np.isinf(values), values, 1 / values)
            return _plain(1 / stretch_means(seconds, _since(columns["tokens"])))
    if chart.event == "train":
        weights = _since(columns["step"] - np.nan_to_num(columns["skipped_steps"], posinf=0))
    return _plain(stretch_means(values, weights))


def _places(run: Run, event: str) -> dict[str, list[float | None] | None]:
    """Where the points of a run lie on each axis: each stretch of lines stands at its last one."""
    columns = getattr(run, event)
    last = _bounds(len(columns["tokens"]))[1:] - 1
    flops = (columns["player_flops"] + columns["critic_flops"])[last]
    return {
        "tokens": [int(tokens) for tokens in columns["tokens"][last]],
        "flops": _plain(flops) if np.isfinite(flops).any() else None,
    }


def stretch_means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Means over at most ``MOST_POINTS`` stretches of lines: what a run that logs less often would have logged.

    Args:
        values: (L,) NaN where a line has none, which counts for nothing; infinity where it is none that is finite.
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


def _since(so_far: np.ndarray) -> np.ndarray:
    """What each line adds to what was counted so far; (L,) → (L,)."""
    return np.diff(so_far, prepend=0)


def _plain(values: np.ndarray) -> list[float | None]:
    return [_six_digits(value) if math.isfinite(value) else None for value in values]


def _six_digits(value: float) -> float:
    """Digits that no screen shows would double a page's size."""
    return float(f"{value:.6g}")
