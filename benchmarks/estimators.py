"""Sampled actions against all of them: the policy gradient's variance and cost, with S = 1 … 64 samples at a position.

    python benchmarks/estimators.py      # rows, and the figure estimators.png

``reinforce`` estimates the gradient of ``expected_reward``, which is computed exactly from all active actions.
benchmarks/README.md says what is measured, and how. Shapes: N positions, V vocabulary.
"""

# ruff: noqa: E402 - torch waits for set_up_process()

from __future__ import annotations

from avatarl.process import set_up_process

set_up_process()

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from timing import DEVICE, HERE, RESULTS, Ready, measure, read, record
from torch import Tensor

from avatarl.objective import AvataRLConfig, BaselineConfig, make_objective, objective_loss
from avatarl.results.pictures import COLOURS, STYLES

SAMPLES = (1, 2, 4, 8, 16, 32, 64)
EXACT, AVATARL = "expected_reward", "avatarl"
REWARDS = {"article": AvataRLConfig.article(), "article without threshold": AvataRLConfig.article(threshold="none")}


@dataclass(frozen=True)
class Case:
    """Where gradients are estimated."""

    rewards: str
    positions: int
    vocabulary: int
    device: str


class Logits(NamedTuple):
    """A language as the player and the critic see it."""

    player: Tensor  # (N, V)
    critic: Tensor  # (N, V)
    targets: Tensor  # (N,)


@functools.lru_cache(maxsize=1)
def make_logits(positions: int, vocabulary: int, device: str) -> Logits:
    """Peaked distributions around a common truth, from which the targets are drawn.

    The truth is a product of hidden states and embeddings plus a token's own frequency; player and critic know it with
    errors of their own. The three numbers below were chosen by eye: with 4,096 tokens the player's cross-entropy is
    about 4.4 nats and the critic's about 5.0, as in the README's demo.
    """
    generator = torch.Generator(device).manual_seed(0)
    normal = functools.partial(torch.randn, generator=generator, device=device)
    width, spread, player_error, critic_error = 64, 3.1, 1.0, 1.5
    hidden, embedding = normal(positions, width), normal(vocabulary, width)
    truth = spread * (hidden @ embedding.t()) / width**0.5 + normal(vocabulary)
    player = truth + player_error * normal(positions, vocabulary)
    critic = truth + critic_error * normal(positions, vocabulary)
    targets = truth.softmax(dim=1).multinomial(1, generator=generator).squeeze(1)
    return Logits(player.requires_grad_(), critic, targets)


def sampled(samples: int) -> str:
    """The name of the estimator that draws so many actions at a position."""
    return f"reinforce S={samples}"


ALTERNATIVES: dict[str, int] = {EXACT: 0, AVATARL: 0} | {sampled(samples): samples for samples in SAMPLES}


def gradient_of(name: str, case: Case) -> Callable[[Tensor | None], Tensor]:
    """A function from uniform draws (N, S) to the gradient over the player's logits (N, V)."""
    baseline = BaselineConfig(samples=max(1, ALTERNATIVES[name]))
    objective = make_objective(name.split()[0], REWARDS[case.rewards], baseline)
    logits = make_logits(case.positions, case.vocabulary, case.device)

    def gradient(uniforms: Tensor | None) -> Tensor:
        loss, _ = objective_loss(objective, *logits, uniforms=uniforms)
        return torch.autograd.grad(loss, logits.player)[0]

    return gradient


def draw(generator: torch.Generator, name: str, case: Case) -> Tensor | None:
    """Uniform draws (N, S) for an estimator; None for what draws nothing."""
    shape = case.positions, ALTERNATIVES[name]
    return torch.rand(shape, generator=generator, device=case.device) if shape[1] else None


def build(name: str, case: Case) -> Ready:
    """Loss and gradient of all positions, ready to be timed."""
    uniforms = draw(torch.Generator(case.device).manual_seed(1), name, case)
    call = functools.partial(gradient_of(name, case), uniforms)
    return Ready(call, warm_up=call)


def scatter(name: str, case: Case, draws: int) -> tuple[float | None, float | None]:
    """How far an estimator is from the exact policy gradient g, over many draws of its estimate ĝ.

    Returns:
        relative_variance: E ‖ĝ − g‖² / ‖g‖².
        bias_ratio: ‖mean of ĝ − g‖² over what variance alone leaves of it, E ‖ĝ − g‖² / draws; about 1 without bias.
    """
    if not ALTERNATIVES[name]:
        return None, None
    exact, estimate = gradient_of(EXACT, case)(None), gradient_of(name, case)
    generator = torch.Generator(case.device).manual_seed(2)
    mean, variance = torch.zeros_like(exact), 0.0
    for _ in range(draws):
        error = estimate(draw(generator, name, case)) - exact
        mean += error / draws
        variance += float(error.square().sum()) / draws
    return variance / float(exact.square().sum()), float(mean.square().sum()) / (variance / draws)


def draw_figure(rows: Sequence[Mapping[str, str]], out: Path) -> None:
    """Variance and cost against the number of samples, from rows of the record."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    variance_axis, cost_axis = figure.subplots(1, 2)
    for rewards, colour, style in zip(REWARDS, COLOURS, STYLES, strict=False):
        found = {row["alternative"]: row for row in rows if row["rewards"] == rewards}
        points = [found[sampled(samples)] for samples in SAMPLES]
        costs = {name: 1e3 * float(row["median_ms"]) / float(row["positions"]) for name, row in found.items()}
        line = dict(color=colour, linestyle=style)
        variances = [float(point["relative_variance"]) for point in points]
        variance_axis.plot(SAMPLES, variances, marker="o", label=f"rewards: {rewards}", **line)
        cost_axis.plot(SAMPLES, [costs[sampled(samples)] for samples in SAMPLES], marker="o", label=rewards, **line)
        cost_axis.axhline(costs[EXACT], linewidth=1, label=f"{rewards}: all actions, exact", **line)
    variance_axis.set_yscale("log")
    variance_axis.set_ylabel("relative variance, E ‖ĝ − g‖² / ‖g‖²")
    variance_axis.set_title("the gradient's noise (all-action evaluation has none)", size=10)
    cost_axis.set_ylim(bottom=0)
    cost_axis.set_ylabel("cost of loss and gradient (µs per position)")
    cost_axis.set_title("what it costs", size=10)
    for axis in (variance_axis, cost_axis):
        axis.set_xscale("log", base=2)
        axis.set_xticks(SAMPLES, labels=[str(samples) for samples in SAMPLES])
        axis.set_xlabel("samples per position, S")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--positions", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--draws", type=int, default=128, help="estimates that the variance is taken over")
    parser.add_argument("--seconds", type=float, default=60, help="about how long the timing takes")
    parser.add_argument("--device", default=DEVICE, choices=("cpu", "cuda"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV file")
    parser.add_argument("--figure", type=Path, default=HERE / "estimators.png", help="the picture to draw")
    asked = parser.parse_args(arguments)

    record_path = asked.results / "estimators.csv"
    cases = [Case(rewards, asked.positions, asked.vocab, asked.device) for rewards in REWARDS]
    timed = measure(build, list(ALTERNATIVES), cases, asked.device, asked.seconds, memory_of=[EXACT, AVATARL])
    for case, measured in list(timed):  # all timing first: the time that scattering takes is not in its budget
        scattered = functools.cache(functools.partial(scatter, case=case, draws=asked.draws))
        record(
            record_path,
            case,
            measured,
            draws=lambda name: asked.draws if ALTERNATIVES[name] else None,
            relative_variance=lambda name, scattered=scattered: scattered(name)[0],
            bias_ratio=lambda name, scattered=scattered: scattered(name)[1],
        )
    recorded = read(record_path)
    draw_figure([row for row in recorded if row["date"] == recorded[-1]["date"]], asked.figure)


if __name__ == "__main__":
    main()
