"""A comparison's report, from the CSV files in its folder: whoever has these can make it again."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from avatarl.durable import remove, replace_file
from avatarl.results.former import Table
from avatarl.results.pages import read_source, render_markdown, render_page, render_picture
from avatarl.results.reporter import line_style
from avatarl.results.runs import read_runs
from avatarl.results.tables import settings_table
from avatarl.sanitise import one_line
from avatarl.version import __version__

from .measures import BETWEEN_SETTINGS, SEVERAL, Row, read_rows, setting_text
from .picture import picture_of
from .statistics import by_seed
from .tables import (
    arms_of,
    budget_table,
    cost_table,
    count_of_p,
    curves_by_run,
    on_edge,
    outcome_table,
    quality_table,
    settings_of,
    tuning_table,
)

# A curve's axes: columns of curves.csv and how a page calls them.
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


def write_reports(folder: Path, baseline: str) -> None:
    """Write ``report.md``, ``report.html`` and ``outcome.svg`` beside the CSV files of ``folder``.

    Raises:
        UserError: A file is missing, or is not what a comparison writes.
    """
    results, curves, tuning = (read_rows(folder / f"{name}.csv") for name in ("results", "curves", "tuning"))
    values = page_values(results, curves, tuning, baseline) | {"settings": _settings(folder, finished(results))}
    remove(folder / PICTURE)
    if values["picture"] is not None:
        replace_file(folder / PICTURE, draw(values))
    replace_file(folder / "report.md", render_markdown("compare.md", **values))
    replace_file(folder / "report.html", _page(values))


def draw(values: Mapping[str, Any]) -> str:
    """The outcome as SVG text, from :func:`page_values`."""
    return render_picture("outcome.svg", picture=values["picture"], baseline_name=values["baseline_name"])


def page_values(results: Sequence[Row], curves: Sequence[Row], tuning: Sequence[Row], baseline: str) -> dict[str, Any]:
    """All that the templates name but the settings."""
    gave_up = [row for row in results if row["cross_entropy"] is None]
    results = finished(results)
    arms = arms_of(results)
    unlike = unlike_baseline(results, curves, baseline)
    tables = {
        "outcome": outcome_table(results, baseline),
        "budgets": budget_table(results, curves, baseline),
        "quality": quality_table(results, baseline),
    }
    return {
        "version": __version__,
        "written": datetime.now(UTC).isoformat(sep=" ", timespec="minutes").removesuffix("+00:00") + " UTC",
        "command": one_line(shlex.join([Path(sys.argv[0]).name.replace("__main__.py", "avatarl"), *sys.argv[1:]])),
        "runs": [{"name": arm, **line_style(number)} for number, arm in enumerate(arms)],
        "baseline": arms.index(baseline),
        "baseline_name": baseline,
        "seeds": sorted({row["seed"] for row in results}),
        "devices": sorted({one_line(str(row["device"])) for row in results if row.get("device") is not None}),
        "warnings": _of_failures(gave_up) + _warnings(results, tuning, baseline, unlike),
        "unlike": list(unlike),
        "picture": picture_of(results, baseline),
        **tables,
        "comparisons": {name: count_of_p(table) for name, table in tables.items()},
        "costs": cost_table(results, baseline),
        "tuning": tuning_table(tuning) if tuning else None,
        **curve_data(curves, arms),
    }


def finished(results: Sequence[Row]) -> list[Row]:
    """The runs that ended; the rows of those that gave up have no numbers."""
    return [row for row in results if row["cross_entropy"] is not None]


def curve_data(curves: Sequence[Row], arms: Sequence[str]) -> dict[str, Any]:
    """Validation cross-entropy of each arm, the mean over seeds at each evaluation, as report.js draws it."""
    series, places = [], []
    for number, arm in enumerate(arms):
        of_arm = [curve for (name, _), curve in curves_by_run(curves).items() if name == arm]
        common = sorted(set.intersection(*({row["step"] for row in curve} for curve in of_arm)))
        means = [_means([row for curve in of_arm for row in curve if row["step"] == step]) for step in common]
        places.append({axis: _column(means, axis) for axis in AXES})
        series.append({"run": number, "y": _column(means, "cross_entropy")})
    chart = {
        "id": "eval-cross_entropy",
        "event": "eval",
        "metric": "cross_entropy",
        "title": "Validation cross-entropy, mean over seeds",
        "unit": "nats per token",
        "note": "",
        "series": series,
    }
    known = {axis: words for axis, words in AXES.items() if all(place[axis] is not None for place in places)}
    return {"charts": [chart], "axes": known, "places": places}


def _means(rows: Sequence[Row]) -> Mapping[str, float | None]:
    names = (*AXES, "cross_entropy")
    columns = {name: [row[name] for row in rows] for name in names}
    return {name: None if None in column else float(np.mean(column)) for name, column in columns.items()}


def _column(rows: Sequence[Mapping[str, float | None]], name: str) -> list[float] | None:
    values = [row[name] for row in rows]
    return None if None in values else [float(f"{value:.6g}") for value in values]


def unlike_baseline(results: Sequence[Row], curves: Sequence[Row], baseline: str) -> dict[str, list[str]]:
    """For each arm that is not in all of :data:`ALIKE` as the baseline's run of the same seed, in what it is not."""
    evaluations = Counter((row["arm"], row["seed"]) for row in curves)
    runs = [row | {"evaluations": evaluations[row["arm"], row["seed"]]} for row in results]
    of_baseline = {run["seed"]: run for run in runs if run["arm"] == baseline}
    unlike: dict[str, dict[str, None]] = {}
    for run in runs:
        other = of_baseline.get(run["seed"], run)
        for name, words in ALIKE.items():
            if run.get(name) != other.get(name):
                unlike.setdefault(run["arm"], {})[words] = None
    return {arm: list(words) for arm, words in unlike.items()}


def _warnings(
    results: Sequence[Row], tuning: Sequence[Row], baseline: str, unlike: Mapping[str, Sequence[str]]
) -> list[tuple[str, list[str]]]:
    """What would mislead somebody who did not know it, and what it is true of (nothing named: all)."""
    warnings = []
    of_arm = {arm: {row["seed"] for row in results if row["arm"] == arm} for arm in arms_of(results)}
    if len(of_arm[baseline]) < 2:
        warnings.append(("One seed: how far another would move a number cannot be told, and there is no interval", []))
    seconds = by_seed(results, baseline, "seconds").values()
    if seconds and max(seconds) > STEADY * min(seconds) > 0:
        spread = f"{100 * (max(seconds) / min(seconds) - 1):.0f} %"
        warnings.append((f"The same work took the baseline up to {spread} longer with one seed than with another", []))
    unknown = [arm for arm in of_arm if any(r["critic_training_flops"] is None for r in results if r["arm"] == arm)]
    named = {
        "Other seeds than the baseline's, so that differences are of the common ones alone": [
            arm for arm, seeds in of_arm.items() if seeds != of_arm[baseline]
        ],
        "Not as the baseline in what stands in brackets, to which a difference may be due": [
            f"{arm} ({', '.join(words)})" for arm, words in unlike.items()
        ],
        "Critics that were made elsewhere, so that what they cost to train is unknown": unknown,
        **_of_tuning(results, tuning),
        **_of_origins(results),
    }
    return warnings + [(words, names) for words, names in named.items() if names]


def _of_failures(gave_up: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """Which runs are missing because they gave up."""
    names = [one_line(f"{row['arm']} (seed {row['seed']})") for row in gave_up]
    return [("Gave up, as refused/ in their folders says; left out, which flatters their arms", names)] if names else []


def _of_tuning(results: Sequence[Row], tuning: Sequence[Row]) -> dict[str, list[str]]:
    """Which arms have settings that were searched for another, or not at all, or might be better beyond the grid."""
    inherited, unsearched, at_edge = [], [], []
    firsts = {row["arm"]: row for row in reversed(results) if "tuned_as" in row}  # which CSV files once had not
    for arm in filter(firsts.get, arms_of(results)):
        other = firsts[arm]["tuned_as"]
        if other is None:
            unsearched.append(arm)
        elif other != arm:
            inherited.append(one_line(f"{arm} (for {other})"))
        own = (firsts[arm]["tuned_settings"] or "").split(BETWEEN_SETTINGS)
        tried = [row for row in tuning if row["arm"] == other]
        for chosen in (row for row in tried if row["is_chosen"]):
            edges = on_edge(chosen, tried, settings_of(tuning))
            if edges := [name for name in edges if setting_text(name, chosen[name]) in own]:
                at_edge.append(one_line(f"{arm} ({', '.join(edges)})"))
    return {
        "Settings that were searched for another arm": inherited,
        "Settings that were not searched": unsearched,
        "A searched value at the edge of the grid, beyond which there may be a better one": at_edge,
    }


def _of_origins(results: Sequence[Row]) -> dict[str, list[str]]:
    """Revisions, precisions and versions, where the runs have several."""
    found = {}
    for name, words in ORIGINS.items():
        values = {each for row in results for each in (row.get(name) or "unknown").split(SEVERAL)}
        values = {value.partition("+")[0] for value in values}  # 2.13.0+cu130 is a build of 2.13.0
        found[words] = sorted(map(one_line, values)) if len(values) > 1 else []
    return found


def _settings(folder: Path, results: Sequence[Row]) -> Table | None:
    """The settings of each arm's first run; None where only the CSV files are there."""
    firsts = {row["arm"]: row["seed"] for row in reversed(results)}
    folders = [folder / "runs" / arm / f"seed-{firsts[arm]}" for arm in arms_of(results)]
    if not all(run.is_dir() for run in folders):
        return None
    runs = read_runs(folders, ())
    of_arms = [dataclasses.replace(run, name=run.folder.parent.name) for run in runs]
    for run in of_arms:  # which differs, and says nothing
        run.settings.pop("out", None)
    return settings_table(of_arms)


def _page(values: Mapping[str, Any]) -> str:
    from plotly.offline import get_plotlyjs

    drawn = {
        "runs": values["runs"],
        "axes": {"eval": values["places"]},
        "charts": values["charts"],
        "reliability": [],
        "line": "arm",
        "titles": values["axes"],
    }
    return render_page("compare.html", [get_plotlyjs(), read_source("report.js")], drawn=drawn, **values)
