"""Pictures as files, by matplotlib: curves of runs, and intervals of differences."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from avatarl.sanitise import visible

from .pages import read_source
from .runs import EVENTS, read_columns

# Okabe and Ito's colours, told apart by colour-blind readers; line styles repeat the difference.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
STYLES = ("-", "--", "-.", ":")
PANELS = (
    ("eval", "cross_entropy", "validation cross-entropy (nats per token)"),
    ("train", "loss", "training loss (each objective's own)"),
    ("train", "expected_reward_share", "reward the policy expects, share of the best"),
    ("train", "other_reward_share", "share of reward on other tokens than the text's"),
)
# Stand-ins for the variables of colours.css, by which an SVG picture follows its reader's colour scheme.
VARIABLES = {name: f"#0{n}0e0f" for n, name in enumerate(("ground", "ink", "quiet", "line", "better", "worse"))}


# --- curves -----------------------------------------------------------------------------------------------------------


def draw_curves(runs: Mapping[str, str | Path], out: str | Path, baselines: Mapping[str, float] | None = None) -> None:
    """Draw validation cross-entropy, training loss and rewards of runs against tokens.

    Args:
        runs: Name to show → run folder.
        out: The picture to write (PNG, SVG or PDF by its suffix).
        baselines: Horizontal lines in the validation panel: name → nats.

    Raises:
        UserError: A folder has no metrics, or they are not what a run writes.
    """
    metrics = list(dict.fromkeys(metric for _, metric, _ in PANELS))
    of_runs = {name: read_columns(run, metrics, may_be_absent=False) for name, run in runs.items()}
    figure = Figure(figsize=(10, 7), layout="constrained")  # not pyplot's, whose backend is the caller's to choose
    for axis, (event, metric, title) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        shown = []
        for number, (name, frames) in enumerate(of_runs.items()):
            points = frames[EVENTS.index(event)][["tokens", metric]].dropna().replace(np.inf, np.nan)
            if not points.empty:
                style = STYLES[(number + number // len(COLOURS)) % len(STYLES)]
                axis.plot(points["tokens"], points[metric], color=COLOURS[number % len(COLOURS)], linestyle=style)
                shown.append(visible(name))
        if metric == "cross_entropy":
            for name, value in (baselines or {}).items():
                axis.axhline(value, color="grey", linewidth=1)
                place = dict(xycoords=("axes fraction", "data"), ha="right", va="bottom", size=8)
                axis.annotate(visible(name), (0.99, value), parse_math=False, **place)
        if event == "train" and metric != "loss":
            axis.set_ylim(bottom=0)
        axis.set_title(title, size=10)
        axis.set_xlabel("training tokens")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}M" if value else "0")
        axis.grid(alpha=0.3)
        if axis.lines:
            # Names are set afterwards: a legend leaves out those that begin with an underscore, and reads `$` as
            # mathematics.
            legend = axis.legend(axis.lines[: len(shown)], ["run"] * len(shown), frameon=False)
            for text, name in zip(legend.get_texts(), shown, strict=True):
                text.set(parse_math=False, text=name)
    figure.savefig(out, dpi=110)


# --- intervals --------------------------------------------------------------------------------------------------------


class Interval(NamedTuple):
    """One line of :func:`interval_chart`."""

    name: str
    mean: float
    lower: float  # of the interval; NaN where there is none
    upper: float
    points: Sequence[float]  # what it is the mean of
    text: str  # numbers, to the right of the line
    verdict: str = ""  # "better", "worse" or nothing: its colour


def interval_chart(intervals: Sequence[Interval], limits: tuple[float, float], title: str, unit: str = "") -> str:
    """Draw means with their intervals and single points around a line at zero.

    Args:
        intervals: From top to bottom.
        limits: The ends of the axis. A mean or interval beyond one of them gets an arrow there.
        title: Above the axis.
        unit: After the axis's numbers.

    Returns:
        SVG text, whose colours follow the reader's colour scheme.
    """
    low, high = limits
    ink = {name: {"color": VARIABLES[name]} for name in VARIABLES}
    figure = Figure(figsize=(10, 0.8 + 0.27 * len(intervals)), layout="constrained", facecolor=VARIABLES["ground"])
    axis = figure.subplots()
    axis.set_facecolor(VARIABLES["ground"])
    axis.axvline(0, linewidth=1, **ink["ink"])
    for place, each in enumerate(intervals):
        colour = ink[each.verdict or "quiet"]
        if not np.isnan(each.lower):
            axis.hlines(place, each.lower, each.upper, linewidth=2, **colour)  # cut off at the axis' ends
        shown = [point for point in each.points if low <= point <= high]
        axis.plot(shown, [place] * len(shown), "o", markersize=5, markerfacecolor="none", **colour)
        if low <= each.mean <= high:
            axis.plot(each.mean, place, "|", markersize=12, markeredgewidth=4, **colour)
        ends = np.array([each.mean, each.lower, each.upper])
        for end, marker, is_beyond in ((low, "<", (ends < low).any()), (high, ">", (ends > high).any())):
            if is_beyond:
                axis.plot(end, place, marker, markersize=8, clip_on=False, **colour)
        axis.annotate(each.text, (1.02, place), xycoords=("axes fraction", "data"), va="center", **ink["ink"])
    axis.set(xlim=limits, ylim=(len(intervals) - 0.5, -0.5), yticks=range(len(intervals)))
    axis.set_yticklabels([visible(each.name) for each in intervals], parse_math=False, **ink["ink"])
    axis.set_title(title, size=10, **ink["quiet"])
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:+g}{unit}".replace("-", "−") if value else f"0{unit}")
    axis.tick_params(length=0, labelsize=10)
    axis.tick_params(axis="x", labelcolor=VARIABLES["quiet"])
    axis.grid(axis="x", **ink["line"])
    axis.set_axisbelow(True)
    axis.spines[:].set_visible(False)
    return _themed(figure)


def _themed(figure: Figure) -> str:
    """A figure as SVG text, with the same bytes each time and the colours of colours.css."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "avatarl", "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    picture = file.getvalue()
    for name, colour in VARIABLES.items():
        picture = picture.replace(colour, f"var(--{name})")
    return picture.replace("<defs>", f"<style>{read_source('colours.css')}</style>\n <defs>", 1)
