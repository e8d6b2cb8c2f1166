"""What finished runs measured, as rows of numbers: one of each run, one of each of its evaluations, one of each point
that was tried. The tables are made from these rows alone, whether they come from runs or from the CSV files."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from avatarl.data import PreparedData
from avatarl.durable import replace_file
from avatarl.errors import UserError
from avatarl.files import File, ask
from avatarl.models.critics import critic_class
from avatarl.results.evaluate import evaluate
from avatarl.results.minimal_pairs import MinimalPair, read_pairs, score_pairs
from avatarl.results.runs import read_metrics, read_record, read_settings, sizes_of_record
from avatarl.untrusted import read_json, refusing

from .config import ComparisonConfig, Settings, by_dotted_names, critics_of
from .progress import Member, Tuned

# Of results.csv: text and whole numbers first, then what an evaluation of the best player on the whole validation split
# says, then what the run took. Units are those of docs/metrics.md.
# ``tuned_as`` is the arm whose search found the settings, empty where none did; ``tuned_settings`` are the values that
# the run had of what the grid holds. ``revision``, ``precision`` and ``torch`` are several where a run was resumed.
LABELS = (
    "arm",
    "seed",
    "objective",
    "tuned_as",
    "tuned_settings",
    "device",
    "precision",
    "revision",
    "torch",
    "parameters",
    "unique_tokens",
    "tokens",
    "best_tokens",
)
WORDS = ("arm", "objective", "tuned_as", "tuned_settings", "device", "precision", "revision", "torch")
SEVERAL, BETWEEN_SETTINGS = ", ", "; "  # between the revisions of a run, and between its tuned settings
EVALUATED = (
    "cross_entropy",
    "bits_per_byte",
    "top1_accuracy",
    "top16_accuracy",
    "entropy",
    "expected_calibration_error",
    "top16_calibration_error",
    "minimal_pairs_accuracy",
)
TRAINED = ("best_cross_entropy", "final_cross_entropy", "other_reward_share", "expected_reward_share")
SPENT = ("player_flops", "critic_flops", "critic_training_flops", "seconds")
RESULT = (*LABELS, *EVALUATED, *TRAINED, *SPENT)
# Of curves.csv. ``flops`` are those of player and critics' forward passes, ``all_flops`` with their training;
# those that were spent before the first step count from the start.
CURVE = ("arm", "seed", "step", "tokens", "flops", "all_flops", "seconds", "cross_entropy")

Row = dict[str, Any]


def result_row(member: Member, comparison: ComparisonConfig, data: PreparedData, out: Path, device: str) -> Row:
    """One run: what its best player does on the whole validation split, and what it took.

    An evaluation is kept in ``OUT/evaluations`` and read back while player, data and pairs are the same.
    """
    record, sizes = read_record(member.folder), sizes_of(member.folder)
    settings = by_dotted_names(read_settings(member.folder))
    found = _evaluation(member, comparison, data, out, device)
    evaluations = read_metrics(member.folder, "eval")
    best, last = min(evaluations, key=lambda line: line["cross_entropy"]), evaluations[-1]
    cached, training = spent_before(member)
    return {
        "arm": member.arm,
        "seed": member.seed,
        "objective": settings["objective"],
        **_tuned(member.arm, settings, comparison),
        "device": record.get("device"),
        **_started_with(record),
        **{name: sizes[name] for name in ("parameters", "unique_tokens", "tokens")},
        "best_tokens": best["tokens"],
        **{name: found[name] for name in EVALUATED[:-1]},
        "minimal_pairs_accuracy": found.get("minimal_pairs", {}).get("accuracy"),
        "best_cross_entropy": best["cross_entropy"],
        "final_cross_entropy": last["cross_entropy"],
        "other_reward_share": last.get("other_reward_share"),
        "expected_reward_share": last.get("expected_reward_share"),
        "player_flops": sizes["player_flops"],
        "critic_flops": sizes["critic_flops"] + cached,
        "critic_training_flops": training,
        "seconds": float(_seconds_of(member, sizes["tokens"])),
    }


def curve_rows(member: Member) -> list[Row]:
    """Every evaluation of a run, with what had been spent until then."""
    cached, training = spent_before(member)
    rows = pd.DataFrame(read_metrics(member.folder, "eval"))
    rows["arm"], rows["seed"] = member.arm, member.seed
    rows["flops"] = rows["player_flops"] + rows["critic_flops"] + cached
    rows["all_flops"] = None if training is None else rows["flops"] + training
    rows["seconds"] = _seconds_of(member, rows["tokens"])
    return rows[list(CURVE)].to_dict("records")


def tuning_rows(tuned: Iterable[Tuned], grid: Mapping[str, Sequence]) -> list[Row]:
    """Every point that the searches tried."""
    return [
        {
            "arm": each.arm,
            **dict(zip(grid, each.point, strict=True)),
            "cross_entropy": each.cross_entropy,
            "is_chosen": int(each.is_chosen),
        }
        for each in tuned
    ]


def setting_text(name: str, value: Any) -> str:
    """A setting with its value, as ``tuned_settings`` has it."""
    return f"{name}={_cell(value)}"


def _tuned(arm: str, settings: Settings, comparison: ComparisonConfig) -> dict[str, str | None]:
    """Whose search found an arm's settings, and what a run had of them."""
    tuned_as = comparison.given("arm", arm).get("tuned_as", arm if comparison.is_tuned(arm) else None)
    grid = comparison.tuning.grid if comparison.tuning else {}
    values = BETWEEN_SETTINGS.join(setting_text(name, settings.get(name)) for name in grid)
    return {"tuned_as": tuned_as, "tuned_settings": values or None}


def _started_with(record: Mapping[str, Any]) -> dict[str, str | None]:
    """What a run was started and resumed with."""
    starts = [record, *record.get("resumed", ())]
    found = {name: [start.get(name) for start in starts] for name in ("precision", "revision")}
    found["torch"] = [start.get("versions", {}).get("torch") for start in starts]
    return {name: SEVERAL.join(dict.fromkeys(filter(None, values))) or None for name, values in found.items()}


def sizes_of(run: Path) -> dict[str, float]:
    """Parameters, tokens and FLOPs of a run, from its record.

    Raises:
        UserError: The record is damaged.
    """
    sizes = sizes_of_record(read_record(run))
    if sizes is None:
        raise UserError(f"{run / 'environment.json'} is missing or damaged; expected the record of a run")
    return sizes


def spent_before(member: Member) -> tuple[float, float | None]:
    """FLOPs that were spent on a run's critics before its first step: on their caches, and on their training.

    The latter is None where one of them, or of the critics that taught them, was made elsewhere, so that nobody knows.
    """
    cached = sizes_of(member.folder)["cached_critic_flops"]
    out = {os.path.abspath(critic.parent.parent) for critic in member.critics}
    own = {
        os.path.join(place, kind, critic.name)
        for place in out
        for critic in member.critics
        for kind in ("critics", "caches")
    }
    for run in (member.folder, *member.critics):
        named = [name for name in critics_of(read_settings(run)) if critic_class(name).is_trained_elsewhere]
        if not own.issuperset(map(os.path.abspath, named)):
            return cached, None
    kinds = ("player_flops", "critic_flops", "cached_critic_flops")
    return cached, sum(sizes_of(critic)[kind] for critic in member.critics for kind in kinds)


def seconds_until(lines: pd.DataFrame, tokens: ArrayLike) -> np.ndarray:
    """Seconds of training until numbers of tokens had been read, by a run's own lines; evaluations not counted."""
    read = np.array([0.0, *lines["tokens"]])
    seconds = np.cumsum(np.diff(read) / lines["tokens_per_second"])
    return np.interp(tokens, read, [0.0, *seconds])  # between two lines in proportion


def _seconds_of(member: Member, tokens: ArrayLike) -> np.ndarray:
    lines = pd.DataFrame(read_metrics(member.folder, "train"), columns=["tokens", "tokens_per_second"])
    return seconds_until(lines, tokens)


def _evaluation(
    member: Member, comparison: ComparisonConfig, data: PreparedData, out: Path, device: str
) -> dict[str, Any]:
    player = member.folder / "player"
    (weights,) = ask(player, [(File(player / "model.safetensors"), "sha256", File.digest)])
    pairs = None if comparison.pairs is None else read_pairs(comparison.pairs)
    of = {"player": weights, "data": data.digest, "pairs": pairs and _digest_of(pairs)}
    path = out / "evaluations" / f"{member.arm}-seed-{member.seed}.json"
    if path.is_file():
        with refusing(f"{path} cannot be read (", "); remove it"):
            kept = read_json(path)
        if kept.get("of") == of:
            return kept["found"]
    found = evaluate(member.folder, data.path, device=device)
    if pairs is not None:
        found["minimal_pairs"] = score_pairs(member.folder, pairs, device=device)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps({"of": of, "found": found}, indent=1))
    return found


def _digest_of(pairs: Sequence[MinimalPair]) -> str:
    return hashlib.sha256(json.dumps([(pair.good, pair.bad) for pair in pairs]).encode()).hexdigest()


# --- CSV --------------------------------------------------------------------------------------------------------------


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV; what a row does not have stays empty."""
    table = pd.DataFrame([[_cell(row.get(name)) for name in columns] for row in rows], columns=list(columns))
    replace_file(path, table.to_csv(index=False, lineterminator="\n"))


def read_rows(path: Path) -> pd.DataFrame:
    """The rows of a CSV file that :func:`write_rows` wrote: NaN where a cell is empty.

    Raises:
        UserError: There is no such file, or it is none of a comparison.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; a comparison's folder or its CSV files are expected")
    types = dict.fromkeys(WORDS, str)
    with refusing(f"{path} cannot be read (", ")"):
        rows = pd.read_csv(path, dtype=types, keep_default_na=False, na_values=[""])
    if "arm" not in rows:
        raise UserError(f"{path} has no column arm; expected a table that `avatarl compare` wrote")
    if not isinstance(rows.index, pd.RangeIndex):
        raise UserError(f"{path} has lines longer than its header; expected what `avatarl compare` wrote")
    return rows


def _cell(value: Any) -> Any:
    if value is None or isinstance(value, float) and math.isnan(value):
        return ""
    return f"{value:.8g}" if isinstance(value, float) else value
