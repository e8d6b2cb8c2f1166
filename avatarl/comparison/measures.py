"""What finished runs measured, as rows of numbers: one of each run, one of each of its evaluations, one of each point
that was tried. The tables are made from these rows alone, whether they come from runs or from the CSV files."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from avatarl.data import PreparedData
from avatarl.durable import replace_file
from avatarl.errors import UserError
from avatarl.files import File, ask
from avatarl.models.critic_cache.parts import MANIFEST as CACHE_MANIFEST
from avatarl.models.critic_cache.read import read_manifest, training_flops
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
    best = min(evaluations, key=lambda line: line["cross_entropy"])
    last = evaluations[-1]
    cached, training = spent_before(member)
    return {
        "arm": member.arm,
        "seed": member.seed,
        "objective": settings["objective"],
        "tuned_as": _tuned_as(member.arm, comparison),
        "tuned_settings": _tuned_settings(settings, comparison),
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
        "seconds": seconds_until(read_metrics(member.folder, "train"), sizes["tokens"]),
    }


def curve_rows(member: Member) -> list[Row]:
    """Every evaluation of a run, with what had been spent until then."""
    cached, training = spent_before(member)
    lines = read_metrics(member.folder, "train")
    rows = []
    for line in read_metrics(member.folder, "eval"):
        flops = line["player_flops"] + line["critic_flops"] + cached
        rows.append(
            {
                "arm": member.arm,
                "seed": member.seed,
                "step": line["step"],
                "tokens": line["tokens"],
                "flops": flops,
                "all_flops": None if training is None else flops + training,
                "seconds": seconds_until(lines, line["tokens"]),
                "cross_entropy": line["cross_entropy"],
            }
        )
    return rows


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


def _tuned_as(arm: str, comparison: ComparisonConfig) -> str | None:
    return (comparison.arms[arm] or {}).get("tuned_as", arm if comparison.is_tuned(arm) else None)


def _tuned_settings(settings: Settings, comparison: ComparisonConfig) -> str | None:
    grid = comparison.tuning.grid if comparison.tuning else {}
    return BETWEEN_SETTINGS.join(setting_text(name, settings.get(name)) for name in grid) or None


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
    cached = cached_flops(member.folder)
    own = {os.path.abspath(place) for critic in member.critics for place in (critic, _cache_of(critic))}
    for run in (member.folder, *member.critics):
        outside = {os.path.abspath(name) for name in critics_of(read_settings(run)) if not _needs_no_training(name)}
        if not outside <= own:
            return cached, None
    trained = [(sizes_of(critic), cached_flops(critic)) for critic in member.critics]
    return cached, sum(sizes["player_flops"] + sizes["critic_flops"] + cached for sizes, cached in trained)


def cached_flops(run: Path) -> float:
    """FLOPs that a run's caches took, by their manifests: records of earlier versions count validation windows too."""
    recorded = sizes_of(run)["cached_critic_flops"]
    caches = [Path(name) for name in critics_of(read_settings(run)) if _is_cache(name)]
    if not recorded or not caches:  # its objective asked none of them, or they are gone
        return recorded
    return sum(training_flops(read_manifest(cache)[1]) for cache in caches)


def _cache_of(critic: Path) -> Path:
    """Where a comparison stores what a critic says that it trained."""
    return critic.parent.parent / "caches" / critic.name


def _is_cache(critic: str) -> bool:
    return os.path.isfile(os.path.join(critic, CACHE_MANIFEST))


def _needs_no_training(critic: str) -> bool:
    return critic.startswith(("ema:", "random:"))


def seconds_until(lines: Iterable[Mapping[str, float]], tokens: float) -> float:
    """Seconds of training until a number of tokens had been read, from a run's own lines; evaluations not counted."""
    seconds = before = 0.0
    for line in lines:
        if line["tokens"] > tokens:
            # The line that lies across it, in proportion.
            return seconds + (tokens - before) / line["tokens_per_second"]
        seconds += (line["tokens"] - before) / line["tokens_per_second"]
        before = line["tokens"]
    return seconds


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


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as CSV; what a row does not have stays empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(row.get(name)) for name in columns})
    replace_file(path, text.getvalue())


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file that :func:`write_rows` wrote: numbers as numbers, None where a cell is empty.

    Raises:
        UserError: There is no such file, or it is none of a comparison.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; a comparison's folder or its CSV files are expected")
    with refusing(f"{path} cannot be read (", ")"), path.open(encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file)
    if "arm" not in header:
        raise UserError(f"{path} has no column arm; expected a table that `avatarl compare` wrote")
    if any(len(line) != len(header) for line in lines):
        raise UserError(f"{path} has a line that is not as long as its header; expected what `avatarl compare` wrote")
    return [{name: _value(name, text) for name, text in zip(header, line, strict=True)} for line in lines]


def _cell(value: Any) -> Any:
    if value is None or isinstance(value, float) and math.isnan(value):
        return ""
    return f"{value:.8g}" if isinstance(value, float) else value


def _value(name: str, text: str) -> Any:
    if text == "":
        return None
    if name in WORDS:
        return text
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text
