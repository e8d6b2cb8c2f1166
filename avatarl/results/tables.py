"""The tables of a report on runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml

from avatarl.sanitise import one_line

from .reporter import ABSENT, Cell, Metric, Table, fixed, flops_unit, signed
from .runs import LARGEST_NUMBER, Run, same_data, same_rewards, sizes_of_record

MOST_EVALUATIONS, MOST_RESUMPTIONS = 20, 20  # lines for people to read
UNKNOWN, NOT_RECORDED = "unknown", "not recorded"

Rows = dict[tuple[str, str, str], Sequence[str | Cell]]  # (section, name, unit) → a cell of each run


class Trained(NamedTuple):
    """What a run did, by its own log and record; None where they do not say."""

    steps: int
    tokens: int
    seconds: float | None  # of training alone
    player_flops: float | None
    critic_flops: float | None
    epochs: float | None

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.seconds else None

    @property
    def total_flops(self) -> float | None:
        return None if self.player_flops is None else self.player_flops + self.critic_flops


def what_was_trained(run: Run, train_tokens: int | None) -> Trained:
    """Sum up a run's log; ``train_tokens`` are its data's, where it does not say what an epoch is."""
    unique_tokens = _size(run, "unique_tokens") or train_tokens
    lines = pd.concat([run.eval, run.train]).sort_values("step", kind="stable")
    last = lines.iloc[-1] if len(lines) else dict.fromkeys(lines, np.nan) | {"step": 0, "tokens": 0}
    tokens, speed = np.diff(run.train["tokens"], prepend=0), run.train["tokens_per_second"]
    flops = [last["player_flops"], last["critic_flops"]]
    return Trained(
        int(last["step"]),
        int(last["tokens"]),
        float((tokens / speed)[speed > 0].sum()) or None,
        *(flops if np.isfinite(flops).all() else (None, None)),
        last["tokens"] / unique_tokens if unique_tokens else None,
    )


# --- what was trained on what -----------------------------------------------------------------------------------------


def overview_table(runs: Sequence[Run], trained: Sequence[Trained]) -> Table:
    """What each run is: objective, sizes, what it read and took, where it ran."""
    scale, unit = flops_unit(max(flops or 0 for done in trained for flops in (done.player_flops, done.critic_flops)))
    columns = []
    for run, done in zip(runs, trained, strict=True):
        settings, record = run.settings, run.record
        flops = {
            "FLOPs of the player": done.player_flops,
            "FLOPs of critics": done.critic_flops,
            "FLOPs of critics' caches, once": _size(run, "cached_critic_flops"),
        }
        columns.append(
            {
                "objective": _words(settings.get("objective")),
                "state": _state(run, done),
                "parameters": _count(run, "parameters"),
                "outside the embedding": _count(run, "non_embedding_parameters"),
                "training tokens": f"{done.tokens:,}",
                "epochs": UNKNOWN if done.epochs is None else f"{done.epochs:.2f}",
                **{name: NOT_RECORDED if n is None else fixed(n / scale, 3) if n else "0" for name, n in flops.items()},
                "training time": _duration(done.seconds),
                **{name: _words(record.get(name)) for name in ("device", "processes", "precision")},
                "critic": _words(settings.get("critic"), missing="none"),
                "data": _words(settings.get("data")),
                "started": _time(record.get("started")),
                "revision": _words(record.get("revision")),
            }
        )
    if not any(_size(run, "cached_critic_flops") for run in runs):
        columns = [{name: text for name, text in column.items() if "caches" not in name} for column in columns]
    rows = {("", name, unit if "FLOPs" in name else ""): [each[name] for each in columns] for name in columns[0]}
    return Table(_frame(runs, rows), is_of_words=True)


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
        runs: The runs.
        trained: What each of them did.
        evaluations: Of the runs that could be evaluated, by their number.
        baseline: The number of the run that the others are compared with.
        is_same_text: For each run whether it was evaluated on the same tokens as the baseline; without that no
            difference is shown.
    """
    logged = [_of_log(run) for run in runs]
    is_same_log = [_validated_alike(run, runs[baseline]) for run in runs]
    is_same_reward = [alike and same_rewards(run, runs[baseline]) for alike, run in zip(is_same_log, runs, strict=True)]
    scale, unit = flops_unit(max(done.total_flops or 0 for done in trained))
    costs = (
        Metric("total_flops", "FLOPs of player and critics", unit, 3, scale=1 / scale),
        Metric("seconds", "training time", "s", 0),
        Metric("tokens_per_second", "throughput", "tokens per second", 0),
    )
    spent = [{metric.name: getattr(done, metric.name) for metric in costs} for done in trained]
    rows: Rows = {}

    def add(section: str, metrics: Sequence[Metric], found: Sequence[Mapping[str, Any]], is_same: Sequence[bool]):
        for metric in metrics:
            values = [each.get(metric.name) for each in found]
            rows[section, metric.title, metric.unit] = _compared(metric, values, baseline, is_same)

    if evaluations:
        found = [evaluations.get(number, {}) for number in range(len(runs))]
        add("Evaluated for this report, on the same windows", EVALUATED, found, is_same_text)
    own = "In each run's own evaluations, on its own windows"
    add(own, BEST, logged, is_same_log)
    add(own, REWARDED, logged, is_same_reward)
    add("What it took", costs, spent, [True] * len(runs))
    return Table(_frame(runs, rows))


def _of_log(run: Run) -> dict[str, float]:
    """The best validation cross-entropy with its tokens, and the rewards of the last evaluation."""
    finite = run.eval[np.isfinite(run.eval["cross_entropy"])]
    if finite.empty:
        return {}
    best = finite.loc[finite["cross_entropy"].idxmin(), ["cross_entropy", "tokens"]]
    return {**best, **run.eval[["expected_reward_share", "other_reward_share"]].iloc[-1]}


def _validated_alike(run: Run, other: Run) -> bool:
    """Whether two runs' own evaluations read the same tokens."""
    settings = ("block_size", "eval_windows")
    return same_data(run, other) and all(run.settings.get(name) == other.settings.get(name) for name in settings)


def _compared(metric: Metric, values: Sequence[Any], baseline: int, is_same: Sequence[bool]) -> list[Cell]:
    """The cells of one metric, with differences to the baseline where they mean something."""
    numbers = [value * metric.scale if _is_number(value) else None for value in values]
    cells = []
    for number, value in enumerate(numbers):
        difference, verdict = "", ""
        if value is not None and number != baseline and numbers[baseline] is not None and is_same[number]:
            change = round(value - numbers[baseline], metric.digits)
            difference = signed(change, metric.digits) if change else "±0" if metric.better else ""
            verdict = {1: "better", -1: "worse"}.get(int(np.sign(change)) * metric.better, "")
        cells.append(Cell(fixed(value, metric.digits), difference, verdict))
    return cells


# --- evaluations, reliability, settings -------------------------------------------------------------------------------


def validation_table(runs: Sequence[Run]) -> Table:
    """Validation cross-entropy at the evaluations of all runs, or at evenly chosen ones where they are many."""
    columns = [run.eval.drop_duplicates("tokens", keep="last").set_index("tokens")["cross_entropy"] for run in runs]
    scores = pd.concat(columns, axis=1).sort_index()
    if len(scores) > MOST_EVALUATIONS:
        scores = scores.iloc[np.linspace(0, len(scores) - 1, MOST_EVALUATIONS).round().astype(int)]
    texts = scores.map(lambda score: "" if math.isnan(score) else fixed(score, 3))
    texts.index = [f"{int(tokens):,}" for tokens in scores.index]
    texts.columns = _names(runs)
    return Table(texts, "Validation cross-entropy, nats per token", "training tokens")


def reliability_tables(runs: Sequence[Run], evaluations: Mapping[int, Mapping[str, Any]]) -> list[Table]:
    """How sure each player was and how often it was right: a table for the first token, one for the first sixteen."""
    titles = {"reliability": "the most likely token", "top16_reliability": "each of the 16 most likely tokens"}
    tables = []
    for metric, title in titles.items():
        bins = [
            (runs[number].name, f"{row['from']:.3g} to {row['to']:.3g}", row)
            for number, evaluation in evaluations.items()
            for row in evaluation[metric]
        ]
        index = pd.MultiIndex.from_tuples([each[:2] for each in bins], names=["section", "name"])
        cells = [[f"{r['count']:,}", fixed(r["confidence"], 4), fixed(r["accuracy"], 4)] for _, _, r in bins]
        frame = pd.DataFrame(cells, index, ["count", "mean confidence", "accuracy"])
        tables.append(Table(frame, f"Reliability of {title}", "confidence"))
    return tables


def settings_table(runs: Sequence[Run]) -> Table:
    """Every setting of every run by its dotted name; those that differ are marked and come first."""
    settings = [{one_line(name): _as_yaml(value) for name, value in run.settings.items()} for run in runs]
    frame = pd.DataFrame(settings, _names(runs), dtype=object).T.fillna(ABSENT)
    differs = frame.nunique(axis=1) > 1
    order = differs.sort_values(ascending=False, kind="stable").index
    return Table(frame.loc[order], marked=list(differs[order]), is_of_words=True)


# --- words ------------------------------------------------------------------------------------------------------------


def _frame(runs: Sequence[Run], rows: Rows) -> pd.DataFrame:
    index = pd.MultiIndex.from_tuples(rows, names=["section", "name", "unit"])
    return pd.DataFrame(
        {name: [cells[number] for cells in rows.values()] for number, name in enumerate(_names(runs))}, index
    )


def _names(runs: Sequence[Run]) -> list[str]:
    return [run.name for run in runs]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST_NUMBER


def _words(value: object, missing: str = UNKNOWN) -> str:
    """What settings or a record say, in words."""
    if value is None:
        return missing
    return one_line(", ".join(map(str, value if isinstance(value, list) else [value])))


def _as_yaml(value: object) -> str:
    """A setting as config.yaml has it, on one line."""
    return one_line(yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n"))


def _size(run: Run, name: str) -> float | None:
    value = (sizes_of_record(run.record) or {}).get(name)
    return value if _is_number(value) else None


def _count(run: Run, name: str) -> str:
    value = _size(run, name)
    return NOT_RECORDED if value is None else f"{value:,.0f}"
