"""Rows of a comparison written by hand, so that what its tables say is known beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from avatarl.comparison.measures import CURVE, RESULT, write_rows

TUNING = ("arm", "optim.learning_rate", "player.preset", "cross_entropy", "is_chosen")


def frame(rows: Sequence[dict], columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Rows as they are read from a CSV file."""
    return pd.DataFrame(list(rows), columns=columns)


def result(arm: str, seed: int, cross_entropy: float, **others: Any) -> dict[str, Any]:
    """A row of results.csv; of an arm whose critics' cost is known."""
    numbers = {name: 0.25 for name in RESULT} | {"minimal_pairs_accuracy": None, "parameters": 1000}
    sizes = {"unique_tokens": 1000, "tokens": 4000, "best_tokens": 3_000_000, "seconds": 20.0}
    flops = {"player_flops": 2_000_000_000, "critic_flops": 0, "critic_training_flops": 0}
    labels = {"arm": arm, "seed": seed, "objective": "avatarl", "tuned_as": arm, "tuned_settings": None}
    origin = {"device": "a machine", "precision": "fp32", "revision": "4847cb8", "torch": "2.13.0"}
    return {**numbers, **sizes, **flops, **labels, **origin, "cross_entropy": cross_entropy, **others}


def curve(
    arm: str, seed: int, scores: Sequence[float], *, flops: int = 10, before: int | None = 0, seconds: float = 0.1
) -> list[dict[str, Any]]:
    """A run's rows of curves.csv: evaluations 100 tokens apart, each token at so many FLOPs and seconds; ``before`` is
    what its critics cost to train."""
    rows = []
    for step, score in enumerate(scores, start=1):
        tokens = 100 * step
        spent = {"tokens": tokens, "flops": tokens * flops, "seconds": tokens * seconds}
        spent["all_flops"] = None if before is None else spent["flops"] + before
        rows.append({"arm": arm, "seed": seed, "step": step, **spent, "cross_entropy": score})
    return rows


def write_comparison(
    folder: Path, results: Sequence[dict], curves: Sequence[dict], tuning: Sequence[dict] = ()
) -> Path:
    """The CSV files that a report is made of."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, columns, rows in (("results", RESULT, results), ("curves", CURVE, curves), ("tuning", TUNING, tuning)):
        write_rows(folder / f"{name}.csv", columns, rows)
    return folder


def write_small_comparison(folder: Path) -> Path:
    """Two arms and two seeds: the second arm is better, dearer, and was searched to the edge of its grid."""
    searched = "optim.learning_rate=0.1; player.preset=1m"
    arms = {"cross_entropy": ([5.0, 4.0, 4.5], {}), "article": ([6.0, 3.5, 3.0], {"flops": 20, "before": 1500})}
    results, curves = [], []
    for arm, (scores, costs) in arms.items():
        for seed in (1, 2):
            own = [score + 0.25 * seed + 0.01 * seed * (arm == "article") for score in scores]
            results.append(result(arm, seed, min(own), tuned_settings=searched if arm == "article" else None))
            curves += curve(arm, seed, own, **costs)
    tuning = [
        {
            "arm": "article",
            "optim.learning_rate": rate,
            "player.preset": "1m",
            "cross_entropy": 5 - rate,
            "is_chosen": n,
        }
        for rate, n in ((0.01, 0), (0.1, 1), (0.03, 0))
    ]
    return write_comparison(folder, results, curves, tuning)
