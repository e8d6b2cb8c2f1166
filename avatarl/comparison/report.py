"""A comparison's report, from the CSV files in its folder: whoever has these can make it again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from avatarl.durable import refuse_link, remove, replace_file
from avatarl.results.reporter import Charts, Table, data_url, line_chart, six_digits, write_page
from avatarl.results.runs import read_runs
from avatarl.results.tables import settings_table
from avatarl.sanitise import one_line

from .measures import BETWEEN_SETTINGS, SEVERAL, read_rows, setting_text
from .picture import outcome_picture
from .statistics import by_seed
from .tables import (
    arms_of,
    budget_table,
    cost_table,
    count_of_p,
    on_edge,
    outcome_table,
    quality_table,
    settings_of,
    tuning_table,
)

# A curve's axes: columns of curves.csv, and how a page calls them.
AXES = {
    "tokens": "training tokens",
    "flops": "FLOPs of player and critics",
    "all_flops": "FLOPs with the critics' training",
    "seconds": "seconds of training",
}
# In which an arm may differ from the baseline though it is not what is compared.
ALIKE = {
    "parameters": "parameters",
    "unique_tokens": "unique tokens",
    "tokens": "training tokens",
    "evaluations": "number of evaluations",
    "device": "device",
    "precision": "precision",
}
# In which all runs should agree.
ORIGINS = {
    "revision": "Runs of several revisions",
    "precision": "Runs in several precisions",
    "torch": "Runs with several versions of PyTorch",
}
PICTURE = "outcome.svg"
STEADY = 1.1  # times the fastest run, within which seconds of the same work are expected

Warnings = dict[str, list[str]]  # what would mislead a reader → what it is true of; nothing named: all


def write_reports(folder: Path, baseline: str) -> None:
    """Write ``report.md``, ``report.html`` and ``outcome.svg`` beside the CSV files of ``folder``.

    Raises:
        UserError: A file is missing, or is not what a comparison writes.
    """
    results, curves, tuning = (read_rows(folder / f"{name}.csv") for name in ("results", "curves", "tuning"))
    values = page_values(results, curves, tuning, baseline)
    values |= {"settings": _settings(folder, finished(results)), "data_url": data_url}
    remove(folder / PICTURE)
    if values["picture"] is not None:
        replace_file(folder / PICTURE, values["picture"])
    for suffix in ("md", "html"):
        refuse_link(folder / f"report.{suffix}")
        write_page(folder / f"report.{suffix}", "compare", **values)


def page_values(results: pd.DataFrame, curves: pd.DataFrame, tuning: pd.DataFrame, baseline: str) -> dict[str, Any]:
    """All that the templates name but the settings, from the rows of the three CSV files."""
    gave_up, results = results[results["cross_entropy"].isna()], finished(results)
    arms = arms_of(results)
    unlike = unlike_baseline(results, curves, baseline)
    tables = {
        "outcome": outcome_table(results, baseline),
        "budgets": budget_table(results, curves, baseline),
        "quality": quality_table(results, baseline),
    }
    return {
        "names": arms,
        "charts": mean_curves(curves, arms),
        "baseline": arms.index(baseline),
        "baseline_name": baseline,
        "seeds": sorted(results["seed"].unique()),
        "devices": sorted(map(one_line, results["device"].dropna().unique())),
        "warnings": warnings_of(results, gave_up, tuning, baseline, unlike),
        "unlike": list(unlike),
        "picture": outcome_picture(results, baseline),
        **tables,
        "comparisons": {name: count_of_p(table) for name, table in tables.items()},
        "costs": cost_table(results, baseline),
        "tuning": tuning_table(tuning) if len(tuning) else None,
    }


def finished(results: pd.DataFrame) -> pd.DataFrame:
    """The runs that ended; the rows of those that gave up have no numbers."""
    return results[results["cross_entropy"].notna()]


def mean_curves(curves: pd.DataFrame, arms: Sequence[str]) -> Charts:
    """Validation cross-entropy of each arm: the mean over seeds at each evaluation that all of them have."""
    axes, lines = [], {}
    for number, arm in enumerate(arms):
        of_arm = curves[curves["arm"] == arm]
        of_step = of_arm[[*AXES, "cross_entropy"]].astype(float).groupby(of_arm["step"])
        means = of_step.agg(lambda column: column.mean(skipna=False))[of_step.size() == of_arm["seed"].nunique()]
        axes.append({axis: None if means[axis].isna().any() else six_digits(means[axis]) for axis in AXES})
        lines[number] = list(means["cross_entropy"])
    title = "Validation cross-entropy, mean over seeds"
    chart = line_chart("eval", "cross_entropy", title, "nats per token", lines)
    known = {axis: words for axis, words in AXES.items() if all(of_arm[axis] is not None for of_arm in axes)}
    return Charts({"eval": axes}, [chart], line="arm", titles=known)


def unlike_baseline(results: pd.DataFrame, curves: pd.DataFrame, baseline: str) -> dict[str, list[str]]:
    """For each arm that is not in all of :data:`ALIKE` as the baseline's run of the same seed, in what it is not."""
    counts = curves.groupby(["arm", "seed"]).size().rename("evaluations").reset_index()
    runs = results.merge(counts, "left", on=["arm", "seed"]).reindex(columns=["arm", "seed", *ALIKE])
    pairs = runs.merge(runs[runs["arm"] == baseline], on="seed", suffixes=("", " of baseline"))
    unlike: dict[str, list[str]] = {}
    for arm in arms_of(results):
        of_arm = pairs[pairs["arm"] == arm]
        for name, words in ALIKE.items():
            own, other = of_arm[name], of_arm[f"{name} of baseline"]
            if ((own != other) & ~(own.isna() & other.isna())).any():
                unlike.setdefault(arm, []).append(words)
    return unlike


# --- warnings ---------------------------------------------------------------------------------------------------------


def warnings_of(
    results: pd.DataFrame, gave_up: pd.DataFrame, tuning: pd.DataFrame, baseline: str, unlike: dict[str, list[str]]
) -> list[tuple[str, list[str]]]:
    """What would mislead somebody who did not know it, and what it is true of (nothing named: all)."""
    lost = [one_line(f"{row.arm} (seed {row.seed})") for row in gave_up.itertuples()]
    found = [("Gave up, as refused/ in their folders says; excluded, which favours these arms", lost)] if lost else []
    seeds = results.groupby("arm", sort=False)["seed"].agg(set)
    if len(seeds[baseline]) < 2:
        found.append(("One seed: how far another would move a number cannot be told, and there is no interval", []))
    seconds = by_seed(results, baseline, "seconds").values()
    if seconds and max(seconds) > STEADY * min(seconds) > 0:
        slower = f"{100 * (max(seconds) / min(seconds) - 1):.0f} %"
        found.append((f"The same work took the baseline up to {slower} longer with one seed than with another", []))
    unknown = results.loc[results["critic_training_flops"].isna(), "arm"].unique()
    named = {
        "Other seeds than the baseline's, so that differences are of the common ones alone": [
            arm for arm, of_arm in seeds.items() if of_arm != seeds[baseline]
        ],
        "Not as the baseline in what stands in brackets, to which a difference may be due": [
            f"{arm} ({', '.join(words)})" for arm, words in unlike.items()
        ],
        "Critics that were made elsewhere, so that what they cost to train is unknown": list(unknown),
        **_warnings_of_tuning(results, tuning),
        **_warnings_of_origins(results),
    }
    return found + [(words, names) for words, names in named.items() if names]


def _warnings_of_tuning(results: pd.DataFrame, tuning: pd.DataFrame) -> Warnings:
    """Which arms have settings that were searched for another, or not at all, or might be better beyond the grid."""
    inherited, unsearched, at_edge = [], [], []
    for row in results.drop_duplicates("arm").itertuples() if "tuned_as" in results else ():
        if pd.isna(row.tuned_as):
            unsearched.append(row.arm)
        elif row.tuned_as != row.arm:
            inherited.append(one_line(f"{row.arm} (for {row.tuned_as})"))
        own = "" if pd.isna(row.tuned_settings) else row.tuned_settings.split(BETWEEN_SETTINGS)
        tried = tuning[tuning["arm"] == row.tuned_as]
        for _, chosen in tried[tried["is_chosen"] == 1].iterrows():
            edges = on_edge(chosen, tried, settings_of(tuning))
            if edges := [name for name in edges if setting_text(name, chosen[name]) in own]:
                at_edge.append(one_line(f"{row.arm} ({', '.join(edges)})"))
    return {
        "Settings that were searched for another arm": inherited,
        "Settings that were not searched": unsearched,
        "A searched value at the edge of the grid, beyond which there may be a better one": at_edge,
    }


def _warnings_of_origins(results: pd.DataFrame) -> Warnings:
    """Revisions, precisions and versions, where the runs have several."""
    found = {}
    for name, words in ORIGINS.items():
        starts = results.get(name, pd.Series(dtype=str)).fillna("unknown").str.split(SEVERAL).explode()
        versions = sorted(set(starts.str.split("+").str[0]))  # 2.13.0+cu130 is a build of 2.13.0
        found[words] = [one_line(version) for version in versions] if len(versions) > 1 else []
    return found


def _settings(folder: Path, results: pd.DataFrame) -> Table | None:
    """The settings of each arm's first run; None where only the CSV files are there."""
    firsts = results.drop_duplicates("arm")
    folders = [folder / "runs" / arm / f"seed-{seed}" for arm, seed in zip(firsts["arm"], firsts["seed"], strict=True)]
    if not all(run.is_dir() for run in folders):
        return None
    runs = [dataclasses.replace(run, name=run.folder.parent.name) for run in read_runs(folders, ())]
    for run in runs:
        run.settings.pop("out", None)  # which differs, and says nothing
    return settings_table(runs)
