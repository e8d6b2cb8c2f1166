"""The tables of a report, built once for all kinds of pages: what they say, not how they look."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import yaml

from avatarl.sanitise import one_line

from .runs import LARGEST_NUMBER, Run, same_data, same_rewards, sizes_of_record

MOST_EVALUATIONS, MOST_RESUMPTIONS = 20, 20  # lines for people to read
ABSENT, UNKNOWN, NOT_RECORDED = "—", "unknown", "not recorded"
FLOPS_UNITS = ((1e21, "ZFLOPs"), (1e18, "EFLOPs"), (1e15, "PFLOPs"), (1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs"))


class Cell(NamedTuple):
    """What stands in one place of a table."""

    text: str
    difference: str = ""  # to the baseline, with its sign, in the row's unit
    verdict: str = ""  # "better" or "worse", where more or less of it is


class Row(NamedTuple):
    """A line of a table."""

    name: str
    cells: tuple[Cell, ...]
    unit: str = ""
    is_marked: bool = False


class Table(NamedTuple):
    """Rows in sections, each with its heading, which may be empty."""

    caption: str
    columns: tuple[str, ...]  # names of the cells of a row
    sections: tuple[tuple[str, tuple[Row, ...]], ...]
    corner: str = ""  # names the rows
    is_of_words: bool = False


class Trained(NamedTuple):
    """What a run did, by its own log and record."""

    steps: int
    tokens: int
    seconds: float | None  # of training alone
    flops: tuple[float, float] | None  # of the player, of critics; None where the run did not log them
    epochs: float | None  # None where nothing says how long one is

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.seconds else None

    @property
    def total_flops(self) -> float | None:
        return sum(self.flops) if self.flops else None


def what_was_trained(run: Run, train_tokens: int | None) -> Trained:
    """Sum up a run's log; ``train_tokens`` are its data's, where it does not say what an epoch is."""
    unique_tokens = _size(run, "unique_tokens") or train_tokens
    last = {"step": 0.0, "tokens": 0.0, "player_flops": math.nan, "critic_flops": math.nan}
    for columns in (run.eval, run.train):
        if len(columns["step"]) and columns["step"][-1] >= last["step"]:
            last = {name: float(columns[name][-1]) for name in last}
    tokens, speed = np.diff(run.train["tokens"], prepend=0), run.train["tokens_per_second"]
    seconds = float(np.sum(tokens[speed > 0] / speed[speed > 0]))
    flops = last["player_flops"], last["critic_flops"]
    return Trained(
        steps=int(last["step"]),
        tokens=int(last["tokens"]),
        seconds=seconds or None,
        flops=flops if all(map(math.isfinite, flops)) else None,
        epochs=last["tokens"] / unique_tokens if unique_tokens else None,
    )


# --- what was trained on what -----------------------------------------------------------------------------------------


def overview_table(runs: Sequence[Run], trained: Sequence[Trained]) -> Table:
    """What each run is: objective, sizes, what it read and took, where it ran."""
    both = list(zip(runs, trained, strict=True))
    caches = [_size(run, "cached_critic_flops") for run in runs]
    flops = [flops for each in trained for flops in each.flops or ()]
    rows = [
        Row("objective", tuple(_words(run.settings.get("objective")) for run in runs)),
        Row("state", tuple(Cell(_state(run, done)) for run, done in both)),
        Row("parameters", tuple(_count(run, "parameters") for run in runs)),
        Row("outside the embedding", tuple(_count(run, "non_embedding_parameters") for run in runs)),
        Row("training tokens", tuple(Cell(f"{done.tokens:,}") for done in trained)),
        Row("epochs", tuple(Cell(UNKNOWN if done.epochs is None else f"{done.epochs:.2f}") for done in trained)),
        _flops_row("FLOPs of the player", [done.flops and done.flops[0] for done in trained], flops),
        _flops_row("FLOPs of critics", [done.flops and done.flops[1] for done in trained], flops),
        *([_flops_row("FLOPs of critics' caches, once", caches, flops)] if any(caches) else []),
        Row("training time", tuple(Cell(_duration(done.seconds)) for done in trained)),
        Row("device", tuple(_words(run.record.get("device")) for run in runs)),
        Row("processes", tuple(_words(run.record.get("processes")) for run in runs)),
        Row("precision", tuple(_words(run.record.get("precision")) for run in runs)),
        Row("critic", tuple(_words(run.settings.get("critic"), missing="none") for run in runs)),
        Row("data", tuple(_words(run.settings.get("data")) for run in runs)),
        Row("started", tuple(Cell(_time(run.record.get("started"))) for run in runs)),
        Row("revision", tuple(_words(run.record.get("revision")) for run in runs)),
    ]
    return Table("", _names(runs), (("", tuple(rows)),), is_of_words=True)


def resumptions(run: Run) -> list[str]:
    """When a run was resumed, and what had changed: a line for each of the last times."""
    starts = run.record.get("resumed")
    lines = []
    for start in starts[-MOST_RESUMPTIONS:] if isinstance(starts, list) else []:
        start = start if isinstance(start, dict) else {}
        changes = start.get("changes")
        changed = "; ".join(map(str, changes)) if isinstance(changes, list) and changes else "nothing changed"
        lines.append(one_line(f"from step {start.get('step', UNKNOWN)}, {_time(start.get('started'))}: {changed}"))
    return lines


def _state(run: Run, done: Trained) -> str:
    if run.has_ended:
        return f"finished, {done.steps:,} steps"
    wanted = run.settings.get("steps")
    return f"at step {done.steps:,}" + (f" of {wanted:,}" if type(wanted) is int else "")


def _time(stamp: object) -> str:
    """A time as a record has it, for people."""
    if stamp is None:
        return UNKNOWN
    return one_line(str(stamp).replace("T", " ", 1).replace("+00:00", " UTC"))


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return UNKNOWN
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60:,} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


# --- results ----------------------------------------------------------------------------------------------------------


class Metric(NamedTuple):
    """How a number is shown and judged."""

    name: str
    title: str
    unit: str
    digits: int
    better: int = 0  # +1 where more is better, -1 where less is
    scale: float = 1.0


EVALUATED = (
    Metric("cross_entropy", "cross-entropy", "nats per token", 3, -1),
    Metric("bits_per_byte", "bits per byte", "bits", 3, -1),
    Metric("perplexity", "perplexity", "", 1, -1),
    Metric("top1_accuracy", "top-1 accuracy", "% of tokens", 1, +1, 100),
    Metric("top16_accuracy", "top-16 accuracy", "% of tokens", 1, +1, 100),
    Metric("entropy", "entropy", "nats", 2),
    Metric("expected_calibration_error", "expected calibration error", "% of probability", 2, -1, 100),
    Metric("top16_calibration_error", "calibration error, top 16", "% of probability", 2, -1, 100),
    Metric("tokens", "tokens evaluated", "", 0),
)
BEST = (
    Metric("cross_entropy", "best validation cross-entropy", "nats per token", 3, -1),
    Metric("tokens", "reached at", "training tokens", 0),
)
# Which compare only where the rewards are the same.
REWARDED = (
    Metric("expected_reward_share", "expected reward at the end", "% of the best possible", 1, +1, 100),
    Metric("other_reward_share", "reward on other tokens at the end", "% of the reward", 1, 0, 100),
)


def results_table(
    runs: Sequence[Run],
    trained: Sequence[Trained],
    evaluations: Mapping[int, Mapping[str, Any]],
    baseline: int,
    is_same_text: Sequence[bool],
) -> Table:
    """How good each run's player is and what it took, with differences to the baseline.

    Args:
        evaluations: Of the runs that could be evaluated, by their number.
        baseline: The number of the run that the others are compared with.
        is_same_text: For each run whether it was evaluated on the same tokens as the baseline; no difference is taken
            where not.
    """
    found = [evaluations.get(number, {}) for number in range(len(runs))]
    logged = [_of_log(run) for run in runs]
    is_same_log = [_validated_alike(run, runs[baseline]) for run in runs]
    is_same_reward = [alike and same_rewards(run, runs[baseline]) for alike, run in zip(is_same_log, runs, strict=True)]
    everywhere = [True] * len(runs)
    sections = []
    if evaluations:
        rows = [_compared(metric, found, baseline, is_same_text) for metric in EVALUATED]
        sections.append(("Evaluated for this report, on the same windows", tuple(rows)))
    rows = [_compared(metric, logged, baseline, is_same_log) for metric in BEST]
    rows += [_compared(metric, logged, baseline, is_same_reward) for metric in REWARDED]
    sections.append(("In each run's own evaluations, on its own windows", tuple(rows)))
    scale, unit = _flops_unit([done.total_flops or 0 for done in trained])
    costs = (
        Metric("total_flops", "FLOPs of player and critics", unit, 3, scale=1 / scale),
        Metric("seconds", "training time", "s", 0),
        Metric("tokens_per_second", "throughput", "tokens per second", 0),
    )
    spent = [{metric.name: getattr(done, metric.name) for metric in costs} for done in trained]
    sections.append(("What it took", tuple(_compared(metric, spent, baseline, everywhere) for metric in costs)))
    return Table("", _names(runs), tuple(sections))


def _of_log(run: Run) -> dict[str, float]:
    """The best validation cross-entropy with its tokens, and the rewards of the last evaluation."""
    scores = run.eval["cross_entropy"]
    if not np.isfinite(scores).any():
        return {}
    best = int(np.nanargmin(scores))
    rewards = {name: float(run.eval[name][-1]) for name in ("expected_reward_share", "other_reward_share")}
    return {"cross_entropy": float(scores[best]), "tokens": float(run.eval["tokens"][best]), **rewards}


def _validated_alike(run: Run, other: Run) -> bool:
    """Whether two runs' own evaluations read the same tokens."""
    settings = ("block_size", "eval_windows")
    return same_data(run, other) and all(run.settings.get(name) == other.settings.get(name) for name in settings)


def _compared(metric: Metric, values: Sequence[Mapping[str, Any]], baseline: int, is_same: Sequence[bool]) -> Row:
    """A row of one metric, with differences to the baseline where they mean something."""
    numbers = [value * metric.scale if _is_number(value := found.get(metric.name)) else None for found in values]
    cells = []
    for number, value in enumerate(numbers):
        if value is None:
            cells.append(Cell(ABSENT))
            continue
        difference, verdict = "", ""
        if number != baseline and numbers[baseline] is not None and is_same[number]:
            change = round(value - numbers[baseline], metric.digits)
            unchanged = "±0" if metric.better else ""
            difference = f"{change:+,.{metric.digits}f}".replace("-", "−") if change else unchanged
            verdict = {1: "better", -1: "worse"}.get(int(np.sign(change)) * metric.better, "")
        cells.append(Cell(f"{value:,.{metric.digits}f}".replace("-", "−"), difference, verdict))
    return Row(metric.title, tuple(cells), metric.unit)


# --- evaluations, reliability, settings -------------------------------------------------------------------------------


def validation_table(runs: Sequence[Run]) -> Table:
    """Validation cross-entropy at the evaluations of all runs, or at evenly chosen ones where they are many."""
    places = np.unique(np.concatenate([run.eval["tokens"] for run in runs]))
    if len(places) > MOST_EVALUATIONS:
        places = places[np.linspace(0, len(places) - 1, MOST_EVALUATIONS).round().astype(int)]
    rows = []
    for place in places:
        found = [run.eval["cross_entropy"][run.eval["tokens"] == place] for run in runs]
        cells = (Cell(_fixed(scores[-1], 3) if len(scores) else "") for scores in found)
        rows.append(Row(f"{int(place):,}", tuple(cells)))
    return Table("Validation cross-entropy, nats per token", _names(runs), (("", tuple(rows)),), "training tokens")


def reliability_tables(runs: Sequence[Run], evaluations: Mapping[int, Mapping[str, Any]]) -> list[Table]:
    """How sure each player was and how often it was right: a table for the first token, one for the first sixteen."""
    titles = {"reliability": "the most likely token", "top16_reliability": "each of the 16 most likely tokens"}
    tables = []
    for metric, title in titles.items():
        sections = []
        for number, evaluation in evaluations.items():
            rows = [
                Row(
                    f"{row['from']:.3g} to {row['to']:.3g}",
                    (Cell(f"{row['count']:,}"), Cell(_fixed(row["confidence"], 4)), Cell(_fixed(row["accuracy"], 4))),
                )
                for row in evaluation[metric]
            ]
            sections.append((runs[number].name, tuple(rows)))
        columns = ("count", "mean confidence", "accuracy")
        tables.append(Table(f"Reliability of {title}", columns, tuple(sections), "confidence"))
    return tables


def settings_table(runs: Sequence[Run]) -> Table:
    """Every setting of every run by its dotted name; those that differ are marked and come first."""
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run.settings):
        values = [_as_yaml(run.settings[name]) if name in run.settings else ABSENT for run in runs]
        rows.append(Row(one_line(name), tuple(map(Cell, values)), is_marked=len(set(values)) > 1))
    rows.sort(key=lambda row: not row.is_marked)
    return Table("", _names(runs), (("", tuple(rows)),), is_of_words=True)


# --- numbers and words ------------------------------------------------------------------------------------------------


def _names(runs: Sequence[Run]) -> tuple[str, ...]:
    return tuple(run.name for run in runs)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST_NUMBER


def _fixed(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else ABSENT


def _words(value: object, missing: str = UNKNOWN) -> Cell:
    """What settings or a record say, in words."""
    if value is None:
        return Cell(missing)
    parts = value if isinstance(value, list) else [value]
    return Cell(one_line(", ".join(map(str, parts))))


def _as_yaml(value: object) -> str:
    """A setting as config.yaml has it, on one line."""
    return one_line(yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n"))


def _size(run: Run, name: str) -> float | None:
    value = (sizes_of_record(run.record) or {}).get(name)
    return value if _is_number(value) else None


def _count(run: Run, name: str) -> Cell:
    value = _size(run, name)
    return Cell(NOT_RECORDED if value is None else f"{value:,.0f}")


def _flops_unit(numbers: Sequence[float]) -> tuple[float, str]:
    """The unit in which the largest of ``numbers`` is a number of few digits."""
    largest = max(numbers, default=0)
    return next((unit for unit in FLOPS_UNITS if largest >= unit[0]), (1.0, ""))


def _flops_row(name: str, values: Sequence[float | None], scaled_by: Sequence[float]) -> Row:
    scale, unit = _flops_unit(scaled_by)
    texts = (NOT_RECORDED if value is None else f"{value / scale:,.3f}" if value else "0" for value in values)
    return Row(name, tuple(map(Cell, texts)), unit)
