"""The tables of a comparison, from its rows and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from avatarl.results.reporter import ABSENT, Cell, Metric, Table, fixed, flops_unit, signed

from .statistics import BySeed, Difference, by_seed, cost_to_reach, paired_difference, reached_within, spread

CROSS_ENTROPY = Metric("cross_entropy", "cross-entropy", "nats per token", 4, -1)
OWN_EVALUATIONS = {"best_cross_entropy": "best evaluation", "final_cross_entropy": "final evaluation"}
QUALITY = (
    Metric("expected_calibration_error", "calibration error", "% of probability", 2, -1, 100),
    Metric("top16_calibration_error", "calibration error, top 16", "% of probability", 2, -1, 100),
    Metric("entropy", "entropy", "nats", 3),
    Metric("top1_accuracy", "top-1 accuracy", "% of tokens", 2, +1, 100),
    Metric("top16_accuracy", "top-16 accuracy", "% of tokens", 2, +1, 100),
    Metric("minimal_pairs_accuracy", "minimal pairs", "% right", 2, +1, 100),
    Metric("other_reward_share", "reward on other tokens", "% of the reward", 2, 0, 100),
    Metric("best_tokens", "best player at", "M tokens", 2, 0, 1e-6),
)
P_COLUMN, BEFORE_P = "p", ", p "  # the latter where p shares a cell
# What every arm may spend as much of as the baseline: a column of curves.csv, and its heading.
BUDGETS = {
    "tokens": "equal tokens",
    "flops": "equal FLOPs, critics' forward passes counted",
    "all_flops": "equal FLOPs, critics' training counted too",
    "seconds": "equal seconds of its own steps",
}
COSTS = {
    "unique_tokens": "unique tokens",
    "tokens": "training tokens",
    "player_flops": "{unit} of the player",
    "critic_flops": "{unit} of critics' forward passes",
    "critic_training_flops": "{unit} of critics' training",
    "seconds": "seconds of training",
}


def outcome_table(results: pd.DataFrame, baseline: str) -> Table:
    """The best player's cross-entropy on the whole validation split, and its difference to the baseline's.

    Beside it the best and the final one of the run's own evaluations, of which the final one was not chosen.
    """
    own = {name: title for name, title in OWN_EVALUATIONS.items() if is_measured(results, name)}
    of_baseline, digits = by_seed(results, baseline, CROSS_ENTROPY.name), CROSS_ENTROPY.digits
    rows = {}
    for arm in arms_of(results):
        values = by_seed(results, arm, CROSS_ENTROPY.name)
        difference = None if arm == baseline else paired_difference(values, of_baseline)
        moved, is_part = ABSENT, False
        if difference is not None:
            paired = np.mean([of_baseline[seed] for seed in values if seed in of_baseline])
            per_cent = f"{signed(100 * difference.mean / paired, 2)} %"
            moved = Cell(signed(difference.mean, digits), per_cent, verdict(difference, CROSS_ENTROPY))
            is_part = difference.count < len(values)
        rows[arm] = {
            "cross-entropy": spread_text(values, CROSS_ENTROPY),
            "difference": moved,
            "95 % interval": interval_text(difference, digits) if difference else ABSENT,
            P_COLUMN: p_text(difference.p) if difference else ABSENT,
            **{title: _compared(CROSS_ENTROPY._replace(name=name), results, arm, baseline)
               for name, title in own.items()},
            "seeds": Cell(str(len(values)), f"{difference.count} in pairs" if is_part else ""),
        }  # fmt: skip
    return _table(rows, baseline)


def budget_table(results: pd.DataFrame, curves: pd.DataFrame, baseline: str) -> Table:
    """The lowest validation cross-entropy of each arm by the time it had spent what the baseline spends in all."""
    runs: dict[str, Curves] = {arm: {} for arm in arms_of(results)}
    for (arm, seed), curve in curves.groupby(["arm", "seed"], sort=False):
        runs.get(arm, {})[seed] = curve
    of_baseline, count = runs[baseline], _count_of_seeds(results, baseline)
    others = {cost: _reached(of_baseline, of_baseline, cost) for cost in BUDGETS}
    rows = {}
    for arm, of_arm in runs.items():
        rows[arm] = {}
        for cost, title in BUDGETS.items():
            other = None if arm == baseline else others[cost]
            rows[arm][title] = compared(CROSS_ENTROPY, _reached(of_arm, of_baseline, cost), other, count)
        rows[arm]["tokens to the baseline's best"] = _tokens_to_reach(of_arm, of_baseline, arm == baseline)
    return _table(rows, baseline)


def quality_table(results: pd.DataFrame, baseline: str) -> Table:
    """Calibration, entropy and accuracies of the best players."""
    metrics = [metric for metric in QUALITY if is_measured(results, metric.name)]
    rows = {
        arm: {f"{each.title}, {each.unit}": _compared(each, results, arm, baseline) for each in metrics}
        for arm in arms_of(results)
    }
    return _table(rows, baseline)


def cost_table(results: pd.DataFrame, baseline: str) -> Table:
    """What a run of each arm took, means over seeds; unknown where it is unknown for one of them."""
    of_arm = results[list(COSTS)].astype(float).groupby(results["arm"], sort=False)
    means = of_arm.agg(lambda column: column.mean(skipna=False))
    flops = [name for name in COSTS if name.endswith("flops")]
    scale, unit = flops_unit(means[flops].max().max())
    means[flops] /= scale
    rows = {}
    for arm, of_arm in means.iterrows():
        rows[arm] = {
            title.format(unit=unit): fixed(
                of_arm[name], 3 if 0 < of_arm[name] < 100 and not name.endswith("tokens") else 0
            )
            for name, title in COSTS.items()
        }
        seconds, of_baseline = of_arm["seconds"], means.loc[baseline, "seconds"]
        if arm != baseline and seconds > 0 and of_baseline > 0:
            rows[arm][COSTS["seconds"]] = Cell(rows[arm][COSTS["seconds"]], f"{seconds / of_baseline:.2f} ×")
    return _table(rows, baseline)


def tuning_table(tuning: pd.DataFrame) -> Table:
    """Every point that the searches tried, one seed each; the chosen ones are marked."""
    settings = settings_of(tuning)
    index, cells, marked = [], [], []
    for arm, tried in tuning.groupby("arm", sort=False):
        for _, row in tried.sort_values(settings).iterrows():
            edges = on_edge(row, tried, settings)
            chosen = f"yes, at the edge of {', '.join(edges)}" if edges else "yes"
            score = row["cross_entropy"]
            index.append((arm, ", ".join(str(row[name]) for name in settings)))
            cells.append((f"{score:.4f}" if math.isfinite(score) else "gave up", chosen if row["is_chosen"] else ""))
            marked.append(bool(row["is_chosen"]))
    frame = pd.DataFrame(
        cells,
        index=pd.MultiIndex.from_tuples(index, names=("section", "name")),
        columns=["best validation cross-entropy", "chosen"],
    )
    return Table(frame, corner=", ".join(settings), marked=marked)


def settings_of(tuning: pd.DataFrame) -> list[str]:
    """The settings that the searches tried."""
    return [name for name in tuning if name not in ("arm", "cross_entropy", "is_chosen")]


def on_edge(chosen: Mapping[str, Any], tried: pd.DataFrame, settings: Sequence[str]) -> list[str]:
    """The settings whose chosen value is the smallest or largest tried, so that a better one may lie beyond."""
    numbers = [name for name in settings if pd.api.types.is_numeric_dtype(tried[name]) and tried[name].nunique() > 1]
    return [name for name in numbers if chosen[name] in (tried[name].min(), tried[name].max())]


# --- cells ------------------------------------------------------------------------------------------------------------


def compared(metric: Metric, values: BySeed, baseline: BySeed | None, count: int) -> Cell:
    """A number over seeds with its paired difference to the baseline's, ``count`` seeds of which there are in all."""
    text = spread_text(values, metric)
    difference = None if baseline is None else paired_difference(values, baseline)
    if difference is None:
        return Cell(text)
    scaled = difference.scaled(metric.scale)
    shown = signed(scaled.mean, metric.digits)
    if scaled.count > 1:
        shown += f" [{interval_text(scaled, metric.digits)}]{BEFORE_P}{p_text(scaled.p)}"
    if scaled.count < count:
        shown += f", in {scaled.count} of {count} seeds"
    return Cell(text, shown, verdict(difference, metric))


def count_of_p(table: Table) -> int:
    """How many comparisons a table holds: its cells with a p."""
    in_cells = table.frame.map(lambda cell: isinstance(cell, Cell) and BEFORE_P in cell.difference)
    own_column = table.frame.get(P_COLUMN, pd.Series(dtype=str)) != ABSENT
    return int(in_cells.to_numpy().sum() + own_column.sum())


def verdict(difference: Difference, metric: Metric) -> str:
    """``better`` or ``worse`` where the 95 % interval does not hold zero."""
    if math.isnan(difference.lower) or difference.lower <= 0 <= difference.upper or not metric.better:
        return ""
    return "better" if difference.mean * metric.better > 0 else "worse"


def spread_text(values: BySeed, metric: Metric) -> str:
    """Mean ± standard deviation."""
    found = spread(values)
    if found is None:
        return ABSENT
    deviation = "" if math.isnan(found.deviation) else f" ± {found.deviation * metric.scale:.{metric.digits}f}"
    return fixed(found.mean * metric.scale, metric.digits) + deviation


def interval_text(difference: Difference, digits: int) -> str:
    """``−0.031 to −0.012``."""
    if math.isnan(difference.lower):
        return ABSENT
    return f"{signed(difference.lower, digits)} to {signed(difference.upper, digits)}"


def p_text(p: float) -> str:
    """p to two digits."""
    if math.isnan(p):
        return ABSENT
    return f"{p:.2g}" if p >= 1e-4 else "< 0.0001"


def _compared(metric: Metric, results: pd.DataFrame, arm: str, baseline: str) -> Cell:
    of_baseline = None if arm == baseline else by_seed(results, baseline, metric.name)
    return compared(metric, by_seed(results, arm, metric.name), of_baseline, _count_of_seeds(results, baseline))


def _table(rows: Mapping[str, Mapping[str, str | Cell]], baseline: str) -> Table:
    """A table of cells by arm and heading."""
    names = [(arm, "baseline" if arm == baseline else "") for arm in rows]
    index = pd.MultiIndex.from_tuples(names, names=("name", "unit"))
    marked = [arm == baseline for arm in rows]
    return Table(pd.DataFrame(list(rows.values()), index=index), corner="arm", marked=marked)


# --- rows -------------------------------------------------------------------------------------------------------------


def arms_of(rows: pd.DataFrame) -> list[str]:
    """The arms in the order in which they come."""
    return list(rows["arm"].unique())


def is_measured(results: pd.DataFrame, name: str) -> bool:
    """Whether any run has a number in that column."""
    return name in results and bool(results[name].notna().any())


def _count_of_seeds(results: pd.DataFrame, arm: str) -> int:
    return int((results["arm"] == arm).sum())


Curves = Mapping[int, pd.DataFrame]  # of an arm's runs, by seed


def _reached(of_arm: Curves, of_baseline: Curves, cost: str) -> dict[int, float]:
    """The lowest cross-entropy of each run within what the baseline's run of the same seed spent."""
    budgets = {seed: of_baseline[seed][cost].iloc[-1] for seed in of_arm if seed in of_baseline}
    reached = {seed: reached_within(of_arm[seed], cost, budget) for seed, budget in budgets.items()}
    return {seed: score for seed, score in reached.items() if score is not None}


def _tokens_to_reach(of_arm: Curves, of_baseline: Curves, is_baseline: bool) -> str | Cell:
    """Tokens until an arm was as good as the baseline's best in the same seed, and as a share of what that took."""
    pairs = {seed: (curve, of_baseline[seed]) for seed, curve in of_arm.items() if seed in of_baseline}
    needed, shares = {}, {}
    for seed, (curve, other) in pairs.items():
        wanted = other["cross_entropy"].min()
        tokens = cost_to_reach(curve, "tokens", wanted)
        if tokens is not None:
            needed[seed], shares[seed] = tokens, tokens / cost_to_reach(other, "tokens", wanted)
    if not needed:
        return "never" if pairs else ABSENT
    mean = spread(needed).mean
    text = f"{mean / 1e6:,.2f} M" if mean >= 1e6 else f"{mean:,.0f}"
    if len(needed) < len(pairs):
        text += f" in {len(needed)} of {len(pairs)}"
    return Cell(text, "" if is_baseline else f"{100 * spread(shares).mean:.0f} %")
