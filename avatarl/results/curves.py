"""Curves of several runs on shared axes, as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from avatarl.sanitise import visible

from .runs import number_of, read_metrics

# Okabe and Ito's colours, told apart by colour-blind readers; line styles repeat the difference.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
STYLES = ("-", "--", "-.", ":")


def draw_curves(runs: Mapping[str, str | Path], out: str | Path, baselines: Mapping[str, float] | None = None) -> None:
    """Draw validation cross-entropy, training loss and rewards of runs against tokens.

    Args:
        runs: Name to show → run folder.
        out: The picture to write (PNG, SVG or PDF by its suffix).
        baselines: Horizontal lines in the validation panel: name → nats.
    """
    panels = (
        ("eval", "cross_entropy", "validation cross-entropy (nats per token)"),
        ("train", "loss", "training loss (each objective's own)"),
        ("train", "expected_reward_share", "reward the policy expects, share of the best"),
        ("train", "other_reward_share", "share of reward on other tokens than the text's"),
    )
    figure = Figure(figsize=(10, 7), layout="constrained")  # not pyplot's, whose backend is the caller's to choose
    axes = figure.subplots(2, 2)
    for axis, (event, metric, title) in zip(axes.flat, panels, strict=True):
        shown: list[str] = []
        for number, (name, run) in enumerate(runs.items()):
            colour = COLOURS[number % len(COLOURS)]
            style = STYLES[(number + number // len(COLOURS)) % len(STYLES)]
            tokens, values = _points(run, event, metric)
            if tokens:
                axis.plot(tokens, values, color=colour, linestyle=style)
                shown.append(visible(name))
        if metric == "cross_entropy":
            for name, value in (baselines or {}).items():
                axis.axhline(value, color="grey", linewidth=1)
                place = dict(xycoords=("axes fraction", "data"), ha="right", va="bottom", size=8)
                axis.annotate(visible(name), (0.99, value), **place).set_parse_math(False)
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
                text.set_parse_math(False)
                text.set_text(name)
    figure.savefig(out, dpi=110)


def _points(run: str | Path, event: str, metric: str) -> tuple[list[float], list[float]]:
    """Tokens and values of a metric, where a run logged it; what is not finite leaves a gap.

    Raises:
        UserError: One of them is no number, or none that can be drawn.
    """
    points: tuple[list[float], list[float]] = [], []
    for line in read_metrics(run, event):
        if metric not in line:
            continue
        for name, numbers in zip(("tokens", metric), points, strict=True):
            numbers.append(number_of(line, name, run))
    return points
