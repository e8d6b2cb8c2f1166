"""What run folders hold, as Python objects."""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from avatarl.errors import UserError
from avatarl.places import CONFIG, ENVIRONMENT, METRICS, located
from avatarl.places import read_settings as settings_in
from avatarl.sanitise import one_line
from avatarl.untrusted import parse_json, read_json, refusing

LONGEST_LINE = 1 << 20
LARGEST_NUMBER = 1e30  # far beyond what a run logs, and far below where the arithmetic of axes overflows
EVENTS = ("train", "eval")


@dataclass(frozen=True, eq=False)
class Run:
    """A run folder, as far as it has been written."""

    folder: Path
    name: str  # tells it from those read with it, on one line
    settings: dict[str, Any]  # by dotted names
    record: dict[str, Any]  # environment.json; empty where it is missing or damaged
    train: pd.DataFrame  # a row for each line: NaN where it has no such number, infinity where it is not finite
    eval: pd.DataFrame
    has_player: bool
    has_ended: bool

    @property
    def critics(self) -> list:
        critic = self.settings.get("critic")
        return critic if isinstance(critic, list) else [] if critic is None else [critic]


def read_runs(folders: Sequence[str | Path], metrics: Sequence[str]) -> list[Run]:
    """Several run folders with the named ``metrics`` of their lines, besides ``step`` and ``tokens``.

    Raises:
        UserError: One is no run folder or given twice, or its settings or metrics are not what a run writes.
    """
    from avatarl.run_dir.identity import flatten

    runs = []
    for folder, name in zip(map(Path, folders), distinct_names(folders), strict=True):
        if not os.path.isdir(folder):
            raise UserError(f"run {folder}: no such folder; expected a run folder")
        if not os.path.lexists(folder / CONFIG):
            inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
            runs_inside = f"; it contains {', '.join(inside)}" if inside else ""
            raise UserError(f"run {folder} has no {CONFIG}; expected a run folder{runs_inside}")
        with refusing(f"{folder / CONFIG} cannot be read (", ")"):
            settings = flatten(read_settings(folder))
            str(settings)  # fails for numbers of thousands of digits, which no page can show
        columns = read_columns(folder, metrics)
        parts = (os.path.isdir(folder / part) for part in ("player", "final"))
        runs.append(Run(folder, name, settings, read_record(folder), *columns, *parts))
    return runs


def same_data(run: Run, other: Run) -> bool:
    """Whether two runs were trained on the same data: by its digests, and by its path where one of them is unknown."""
    digests = [each.record.get("data_digest") for each in (run, other)]
    if None in digests:
        return run.settings.get("data") == other.settings.get("data")
    return digests[0] == digests[1]


def same_rewards(run: Run, other: Run) -> bool:
    """Whether two runs were rewarded by the same critics under the same settings, so that their rewards compare."""

    def rules(of: Run) -> list:
        identity = of.record.get("identity")
        identity = identity if isinstance(identity, dict) else {}
        # The same weights under another path are the same critic.
        critics = [digest for name, digest in identity.items() if name.startswith("critic ")]
        settings = {name: value for name, value in of.settings.items() if name.startswith(("avatarl.", "schedules."))}
        return [settings, critics or of.critics]

    return rules(run) == rules(other)


def distinct_names(folders: Sequence[str | Path]) -> list[str]:
    """For each folder the end of its path that no other has, on one line.

    Raises:
        UserError: A folder is given twice.
    """
    paths = [Path(os.path.abspath(folder)).parts for folder in folders]
    for number, parts in enumerate(paths):
        if parts in paths[:number]:
            raise UserError(f"run {folders[number]} is given twice; expected different run folders")
    names = []
    for parts in paths:
        others = [other for other in paths if other != parts]
        length = next(n for n in range(1, len(parts) + 1) if all(other[-n:] != parts[-n:] for other in others))
        names.append(one_line("/".join(parts[-length:])))
    return names


def read_settings(run: str | Path) -> dict:
    """What a run's config.yaml holds, nested as it is there, with paths where they are now.

    Raises:
        UserError: There is no such file, or it holds no settings by name.
    """
    from avatarl.run_dir.identity import flatten
    from avatarl.training.config import idle_settings

    settings = located(settings_in(Path(run) / CONFIG), run)
    if "critic" in idle_settings(flatten(settings)):
        settings["critic"] = None  # runs of earlier versions name one that they did not use
    return settings


def read_record(run: str | Path) -> dict:
    """What a run's environment.json says of it; empty where there is none that can be read."""
    try:
        record = read_json(Path(run) / ENVIRONMENT)
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def sizes_of_record(record: dict) -> dict | None:
    """Parameters, tokens and FLOPs as a run's record has them from its last start, for settings may have changed since
    the first; None where it does not say."""
    resumed = record.get("resumed")
    starts = [record, *(resumed if isinstance(resumed, list) else [])]
    sizes = [start.get("sizes") for start in starts if isinstance(start, dict)]
    return next((found for found in reversed(sizes) if isinstance(found, dict)), None)


def read_metrics(run: str | Path, event: str) -> list[dict]:
    """The lines of ``event`` (``train`` or ``eval``) in a run's metrics.jsonl, in order of steps.

    Raises:
        UserError: There is no such file, or a line is not what a run writes.
    """
    return [line for line in _lines(run) if line["event"] == event]


def read_columns(run: str | Path, metrics: Sequence[str], may_be_absent: bool = True) -> list[pd.DataFrame]:
    """``step``, ``tokens`` and the named ``metrics`` of the train lines and of the eval lines, a row for each line.

    A run that is still training is read as it stands: a last line that is still being written is left out, and where
    metrics.jsonl ``may_be_absent`` there are no lines without it.

    Raises:
        UserError: A line is not what a run writes, or a value is not a number or too large to draw.
    """
    path, names = Path(run) / METRICS, ["step", "tokens", *metrics]
    rows: dict[str, list[list[float]]] = {event: [] for event in EVENTS}
    for line in [] if may_be_absent and not os.path.lexists(path) else _lines(run, may_be_torn=True):
        if line["event"] in EVENTS:
            row = [_number(line, name, path) for name in names]
            if not (math.isfinite(row[0]) and math.isfinite(row[1])):
                raise UserError(f"{path}: a line has no step or no tokens; expected both")
            rows[line["event"]].append(row)
    return [pd.DataFrame(rows[event], columns=names, dtype=float) for event in EVENTS]


def _number(line: dict, name: str, path: Path) -> float:
    """A number in a line of metrics: NaN where it is missing, infinity where it is not finite."""
    if name not in line:
        return math.nan
    value = line[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{path}: {name} in metrics.jsonl is {reprlib.repr(value)}; expected a number")
    if isinstance(value, float) and not math.isfinite(value):
        return math.inf
    if abs(value) > LARGEST_NUMBER:
        raise UserError(f"{path}: {name} in metrics.jsonl is {reprlib.repr(value)}; too large to be drawn")
    return float(value)


def _lines(run: str | Path, may_be_torn: bool = False) -> Iterator[dict]:
    """Every line of a run's metrics; a torn last one may be left out."""
    path = Path(run) / METRICS
    if not os.path.isfile(path):
        raise UserError(f"{run} has no metrics.jsonl that is a regular file; expected a run folder")
    with path.open("rb") as file:
        for number, text in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), start=1):
            try:
                line = parse_json(text)
                line["event"]  # noqa: B018
            except (ValueError, KeyError, TypeError):
                if may_be_torn and not text.endswith(b"\n") and len(text) < LONGEST_LINE:
                    return
                raise UserError(f"{path}, line {number}, is not a line of metrics") from None
            yield line
