"""Random landscapes and the oracle's answers over them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from avatarl import AvataRLConfig
from avatarl.objective import reference

LANDSCAPE_SETTINGS = (
    "top_k",
    "player_proposes",
    "top_p",
    "smoothing",
    "pool",
    "tail",
    "tail_samples",
    "reality_weight",
    "critic_weight",
    "reward_scale",
    "threshold",
    "reward_cap",
)
LOSS_SETTINGS = (*LANDSCAPE_SETTINGS, "entropy_coef", "temperature", "per_action_mean")


def random_inputs(positions=24, vocabulary=29, critics=1, seed=0, dtype=torch.float64, spread=3.0):
    """Player logits (N, V) that require grad, a list of critic logits (N, V), targets (N,)."""
    generator = torch.Generator().manual_seed(seed)

    def logits():
        return (torch.randn(positions, vocabulary, generator=generator, dtype=torch.float64) * spread).to(dtype)

    targets = torch.randint(vocabulary, (positions,), generator=generator)
    return logits().requires_grad_(), [logits() for _ in range(critics)], targets


def settings_of(config: AvataRLConfig, names=LOSS_SETTINGS) -> dict:
    """The oracle's keyword arguments for ``config``."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name in names}


def oracle(objective, player: Tensor, critics, targets: Tensor, **arguments) -> tuple[float, Tensor]:
    """Mean loss and its gradient (N, V) of ``reference.<objective>`` over all positions."""
    results = [
        getattr(reference, objective)(*position, **{k: v[i] if k in PER_POSITION else v for k, v in arguments.items()})
        for i, position in enumerate(_positions(objective, player, critics, targets))
    ]
    loss = sum(result["loss"] for result in results) / len(results)
    gradient = torch.tensor([result["gradient"] for result in results], dtype=torch.float64) / len(results)
    return loss, gradient


PER_POSITION = ("uniforms", "uniform", "snapshot")


def _positions(objective, player, critics, targets):
    for i, target in enumerate(targets.tolist()):
        z, others = player[i].tolist(), [critic[i].tolist() for critic in critics]
        yield (z, target) if objective in ("cross_entropy", "label_smoothing") else (z, others, target)
