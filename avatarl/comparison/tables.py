"""The tables of a comparison, from its rows and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from avatarl.results.former import Row, Table
from avatarl.results.reporter import ABSENT, FLOPS_UNITS, Cell, Metric

from .measures import Row as Measured
from .statistics import (
    BySeed,
    Difference,
    by_seed,
    cost_to_reach,
    paired_difference,
    reached_within,
    spread,
)

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
# What both are given of: a column of curves.csv, and how it is called.
BUDGETS = {
    "tokens": "equal tokens",
    "flops": "equal FLOPs, critics' forward passes counted",
    "all_flops": "equal FLOPs, critics' training counted too",
    "seconds": "equal seconds of its own steps",
}


def outcome_table(results: Sequence[Measured], baseline: str) -> Table:
    """The best player's cross-entropy on the whole validation split, and its difference to the baseline's.

    Beside it the best and the final one of the run's own evaluations, of which the final one was not chosen.
    """
    own = [name for name in OWN_EVALUATIONS if any(row.get(name) is not None for row in results)]
    rows = []
    of_baseline = by_seed(results, baseline, "cross_entropy")
    for arm in arms_of(results):
        values = by_seed(results, arm, "cross_entropy")
        difference = None if arm == baseline else paired_difference(values, of_baseline)
        cells = [Cell(spread_text(values, CROSS_ENTROPY))]
        if difference is None:
            cells += [Cell(ABSENT)] * 3
        else:
            paired = spread({seed: of_baseline[seed] for seed in values if seed in of_baseline})
            cells += [
                Cell(
                    signed(difference.mean, CROSS_ENTROPY.digits),
                    f"{signed(100 * difference.mean / paired.mean, 2)} %",
                    verdict(difference, CROSS_ENTROPY),
                ),
                Cell(interval_text(difference, CROSS_ENTROPY.digits)),
                Cell(p_text(difference.p)),
            ]
        cells += [_compared(CROSS_ENTROPY._replace(name=name), results, arm, baseline) for name in own]
        is_part = difference is not None and difference.count < len(values)
        cells.append(Cell(str(len(values)), f"{difference.count} in pairs" if is_part else ""))
        rows.append(_row(arm, cells, baseline))
    evaluations = (OWN_EVALUATIONS[name] for name in own)
    columns = ("cross-entropy", "difference", "95 % interval", P_COLUMN, *evaluations, "seeds")
    return Table("", columns, (("", tuple(rows)),), "arm")


def budget_table(results: Sequence[Measured], curves: Sequence[Measured], baseline: str) -> Table:
    """The lowest validation cross-entropy of each arm by the time it had spent what the baseline spends in all."""
    of_run, count = curves_by_run(curves), len(_seeds_of(results, baseline))
    rows = []
    for arm in arms_of(results):
        cells = []
        for cost in BUDGETS:
            reached = {name: _reached(of_run, name, baseline, cost) for name in (arm, baseline)}
            cells.append(compared(CROSS_ENTROPY, reached[arm], None if arm == baseline else reached[baseline], count))
        cells.append(_tokens_to_reach(of_run, arm, baseline))
        rows.append(_row(arm, cells, baseline))
    columns = (*BUDGETS.values(), "tokens to the baseline's best")
    return Table("", columns, (("", tuple(rows)),), "arm")


def quality_table(results: Sequence[Measured], baseline: str) -> Table:
    """Calibration, entropy and accuracies of the best players."""
    metrics = [metric for metric in QUALITY if any(row.get(metric.name) is not None for row in results)]
    rows = []
    for arm in arms_of(results):
        cells = [_compared(metric, results, arm, baseline) for metric in metrics]
        rows.append(_row(arm, cells, baseline))
    return Table("", tuple(f"{metric.title}, {metric.unit}" for metric in metrics), (("", tuple(rows)),), "arm")


def cost_table(results: Sequence[Measured], baseline: str) -> Table:
    """What a run of each arm took, means over seeds."""
    names = ("unique_tokens", "tokens", "player_flops", "critic_flops", "critic_training_flops", "seconds")
    means = {
        arm: {name: _mean([row[name] for row in results if row["arm"] == arm]) for name in names}
        for arm in arms_of(results)
    }
    flops = [number or 0 for of_arm in means.values() for name, number in of_arm.items() if name.endswith("flops")]
    scale, unit = next((unit for unit in FLOPS_UNITS if max(flops) >= unit[0]), (1.0, "FLOPs"))
    rows = []
    for arm, of_arm in means.items():
        cells = []
        for name, number in of_arm.items():
            is_flops, digits = name.endswith("flops"), 0 if name.endswith("tokens") else 3
            cells.append(Cell(_amount(number and number / (scale if is_flops else 1), digits)))
        seconds, of_baseline = of_arm["seconds"], means[baseline]["seconds"]
        if arm != baseline and seconds and of_baseline:
            cells[-1] = Cell(cells[-1].text, f"{seconds / of_baseline:.2f} ×")
        rows.append(_row(arm, cells, baseline))
    columns = (
        "unique tokens",
        "training tokens",
        f"{unit} of the player",
        f"{unit} of critics' forward passes",
        f"{unit} of critics' training",
        "seconds of training",
    )
    return Table("", columns, (("", tuple(rows)),), "arm")


def tuning_table(tuning: Sequence[Measured]) -> Table:
    """Every point that the searches tried, one seed each; the chosen ones are marked."""
    settings = settings_of(tuning)
    sections = []
    for arm in arms_of(tuning):
        of_arm = [row for row in tuning if row["arm"] == arm]
        rows = []
        for row in sorted(of_arm, key=lambda row: [_order(row[name]) for name in settings]):
            score = row["cross_entropy"]
            text = f"{score:.4f}" if math.isfinite(score) else "gave up"
            name = ", ".join(str(row[name]) for name in settings)
            edges = on_edge(row, of_arm, settings)
            chosen = f"yes, at the edge of {', '.join(edges)}" if edges else "yes"
            chosen = chosen if row["is_chosen"] else ""
            rows.append(Row(name, (Cell(text), Cell(chosen)), is_marked=bool(row["is_chosen"])))
        sections.append((arm, tuple(rows)))
    return Table("", ("best validation cross-entropy", "chosen"), tuple(sections), ", ".join(settings))


def settings_of(tuning: Sequence[Measured]) -> list[str]:
    """The settings that the searches tried."""
    return [name for name in tuning[0] if name not in ("arm", "cross_entropy", "is_chosen")] if tuning else []


def on_edge(chosen: Measured, tried: Sequence[Measured], settings: Sequence[str]) -> list[str]:
    """The settings whose chosen value is the smallest or largest tried, so that a better one may lie beyond."""
    edges = []
    for name in settings:
        values = {row[name] for row in tried if isinstance(row[name], (int, float))}
        if len(values) > 1 and chosen[name] in (min(values), max(values)):
            edges.append(name)
    return edges


# --- cells ------------------------------------------------------------------------------------------------------------


def compared(metric: Metric, values: BySeed, baseline: BySeed | None, count: int) -> Cell:
    """A number over seeds with its paired difference to the baseline's, ``count`` seeds of which there are in all."""
    if not values:
        return Cell(ABSENT)
    text = spread_text(values, metric)
    difference = None if baseline is None else paired_difference(values, baseline)
    if difference is None:
        return Cell(text)
    scaled = Difference(*(value * metric.scale for value in difference[:3]), *difference[3:])
    interval = interval_text(scaled, metric.digits)
    shown = signed(scaled.mean, metric.digits)
    if interval != ABSENT:
        shown += f" [{interval}]{BEFORE_P}{p_text(scaled.p)}"
    if scaled.count < count:
        shown += f", in {scaled.count} of {count} seeds"
    return Cell(text, shown, verdict(difference, metric))


def count_of_p(table: Table) -> int:
    """How many comparisons a table holds: its cells with a p."""
    cells = [each for _, rows in table.sections for row in rows for each in zip(table.columns, row.cells, strict=True)]
    return sum(BEFORE_P in cell.difference or (name == P_COLUMN and cell.text != ABSENT) for name, cell in cells)


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
    mean = f"{found.mean * metric.scale:,.{metric.digits}f}".replace("-", "−")
    deviation = "" if math.isnan(found.deviation) else f" ± {found.deviation * metric.scale:.{metric.digits}f}"
    return mean + deviation


def interval_text(difference: Difference, digits: int) -> str:
    """``−0.031 to −0.012``."""
    if math.isnan(difference.lower):
        return ABSENT
    return f"{signed(difference.lower, digits)} to {signed(difference.upper, digits)}"


def signed(number: float, digits: int) -> str:
    """A difference with its sign; a typographic minus."""
    text = f"{number:+,.{digits}f}"
    return (text[1:] if float(text.replace(",", "")) == 0 else text).replace("-", "−")


def p_text(p: float) -> str:
    """p to two digits."""
    if math.isnan(p):
        return ABSENT
    return f"{p:.2g}" if p >= 1e-4 else "< 0.0001"


def _compared(metric: Metric, results: Sequence[Measured], arm: str, baseline: str) -> Cell:
    of_baseline = None if arm == baseline else by_seed(results, baseline, metric.name)
    return compared(metric, by_seed(results, arm, metric.name), of_baseline, len(_seeds_of(results, baseline)))


def _row(arm: str, cells: Sequence[Cell], baseline: str) -> Row:
    return Row(arm, tuple(cells), "baseline" if arm == baseline else "", is_marked=arm == baseline)


def _amount(number: float | None, digits: int) -> str:
    if number is None:
        return ABSENT
    return f"{number:,.{digits if 0 < number < 100 else 0}f}"


def _tokens(number: float) -> str:
    return f"{number / 1e6:,.2f} M" if number >= 1e6 else f"{number:,.0f}"


# --- rows -------------------------------------------------------------------------------------------------------------


def arms_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The arms in the order in which they come."""
    return list(dict.fromkeys(row["arm"] for row in rows))


def _seeds_of(results: Sequence[Measured], arm: str) -> set[int]:
    return {row["seed"] for row in results if row["arm"] == arm}


def curves_by_run(curves: Sequence[Measured]) -> dict[tuple[str, int], list[Measured]]:
    """The evaluations of each run, in order."""
    of_run: dict[tuple[str, int], list[Measured]] = {}
    for row in curves:
        of_run.setdefault((row["arm"], row["seed"]), []).append(row)
    return of_run


def _reached(of_run: Mapping[tuple[str, int], list[Measured]], arm: str, baseline: str, cost: str) -> BySeed:
    reached = {}
    for (name, seed), curve in of_run.items():
        budget = of_run.get((baseline, seed), [{}])[-1].get(cost)
        if name == arm and budget is not None:
            best = reached_within(curve, cost, budget)
            if best is not None:
                reached[seed] = best
    return reached


def _tokens_to_reach(of_run: Mapping[tuple[str, int], list[Measured]], arm: str, baseline: str) -> Cell:
    """Tokens until an arm was as good as the baseline's best in the same seed, and as a share of what that took."""
    needed, shares, asked = {}, {}, 0
    for (name, seed), curve in of_run.items():
        other = of_run.get((baseline, seed))
        if name == arm and other:
            asked += 1
            wanted = min(row["cross_entropy"] for row in other)
            tokens, of_baseline = (cost_to_reach(each, "tokens", wanted) for each in (curve, other))
            if tokens is not None:
                needed[seed], shares[seed] = tokens, tokens / of_baseline
    if not needed:
        return Cell(ABSENT if not asked else "never")
    text = _tokens(spread(needed).mean)
    if len(needed) < asked:
        text += f" in {len(needed)} of {asked}"
    return Cell(text, "" if arm == baseline else f"{100 * spread(shares).mean:.0f} %")


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values or not values else sum(values) / len(values)


def _order(value: Any) -> tuple[int, float, str]:
    return (0, value, "") if isinstance(value, (int, float)) else (1, 0.0, str(value))
