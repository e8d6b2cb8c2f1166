"""Runs what a comparison lacks, and writes what it found: three CSV files, and a report made from them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import yaml

from avatarl.durable import refuse_link, replace_file
from avatarl.errors import RunFailed, UserError
from avatarl.lock import RunLock
from avatarl.places import COMPARISON, kept
from avatarl.untrusted import check_place, refusing

from .config import ComparisonConfig

FOLDERS = ("runs", "tuning", "critics", "caches", "recipes", "logs", "evaluations")  # in a comparison's own


def compare(comparison: ComparisonConfig, *, device: str = "auto", quiet: bool = False) -> None:
    """Train every arm with every seed, and say how they differ.

    What lies in ``comparison.out`` already is not done again: the same call goes on where one was stopped, and with
    further arms or seeds adds them. ``comparison.out`` then holds ``results.csv``, ``curves.csv`` and ``tuning.csv``,
    ``report.html`` and ``report.md``, ``outcome.svg``, the runs, their recipes and what they printed.

    Args:
        comparison: What is compared.
        device: Where the finished players are evaluated: ``cpu``, ``cuda`` or ``auto``.
        quiet: Print nothing.

    Raises:
        UserError: A setting is wrong, or the folder holds runs of another comparison.
        RunFailed: A run failed, or ``comparison.out`` cannot be written.
        RunStopped: SIGTERM, SIGINT or SIGHUP; the same call goes on.
    """
    from avatarl.data import PreparedData
    from avatarl.results.minimal_pairs import read_pairs

    from .measures import CURVE, RESULT, curve_rows, result_row, tuning_rows, write_rows
    from .progress import Job, Progress
    from .report import write_reports
    from .workers import Workers

    out = Path(comparison.out)
    check_place(out)
    if os.path.exists(out) and not os.path.isdir(out):
        raise UserError(f"out is {out}, which is a file; expected a folder to make")
    base = comparison.base_settings()
    data_folder = base.pop("data", None)
    if data_folder is None:
        raise UserError("data is not given; expected a prepared data folder, here or in the base recipe")
    if comparison.pairs is not None:
        read_pairs(comparison.pairs)
    data = PreparedData.open(data_folder)
    progress = Progress.of(comparison, data)  # finds what is wrong before anything is made

    def say(message: str) -> None:
        if not quiet:
            print(message, file=sys.stderr, flush=True)

    def look() -> list[Job]:
        nonlocal progress
        progress = Progress.of(comparison, data, progress)
        return progress.missing

    for path in (*(out / name for name in FOLDERS), *(out / "runs").glob("*"), *(out / "tuning").glob("*")):
        refuse_link(path)
    with refusing(f"out is {out}, which cannot be made (", ")"):
        out.mkdir(parents=True, exist_ok=True)
    with _failures_in_one_line(out), RunLock(out):
        # Whole, with the settings of a base that may lie elsewhere or change.
        settings = {**asdict(comparison), "base": base, "data": data_folder}
        replace_file(out / COMPARISON, yaml.safe_dump(kept(settings, comparison.critics), sort_keys=False))
        with Workers(out, comparison.workers, say) as workers:
            if progress.missing:
                say(f"{len(progress.members)} runs are there; {workers.count} at once for what is missing")
            workers.work_until(look)
        say(f"evaluating {len(progress.members)} players")
        results = [result_row(member, comparison, data, out, device) for member in progress.members]
        results += [{"arm": arm, "seed": seed} for arm, seed in progress.gave_up]  # without any number
        write_rows(out / "results.csv", RESULT, results)
        write_rows(out / "curves.csv", CURVE, [row for member in progress.members for row in curve_rows(member)])
        grid = comparison.tuning.grid if comparison.tuning else {}
        tuning = ("arm", *grid, "cross_entropy", "is_chosen")
        write_rows(out / "tuning.csv", tuning, tuning_rows(progress.tuned, grid))
        write_reports(out, comparison.baseline)


@contextlib.contextmanager
def _failures_in_one_line(out: Path) -> Iterator[None]:
    """A disk that is full, read-only or gone ends the comparison in one line."""
    try:
        yield
    except OSError as error:
        raise RunFailed(f"{out} cannot be written or read ({error}); when it can, the same command goes on") from error
