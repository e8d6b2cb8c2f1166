"""Settings that change from step to step, as tensors: a new value needs no new graph and no wait for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .config import AvataRLConfig, BaselineConfig


class Scheduled(NamedTuple):
    """The values of one step; each replaces or scales the setting it is named after."""

    critic_factors: Tensor  # (C,) in (0, 1], what each critic's weight is multiplied by; the text gains what they lose
    smoothing: Tensor  # ()
    entropy_coef: Tensor  # ()


Weight = float | Tensor


def base_weights(config: AvataRLConfig, num_critics: int) -> Sequence[float]:
    """Each critic's weight before any schedule; :meth:`AvataRLConfig.critic_weights` has checked their number."""
    weight = config.critic_weight
    if isinstance(weight, tuple):
        return weight if num_critics else ()
    return (weight / max(1, num_critics),) * num_critics


def expert_weights(
    config: AvataRLConfig, num_critics: int, scheduled: Scheduled | None
) -> tuple[Weight, Sequence[Weight]]:
    """The weight of the text, and that of each critic; their sum does not change over time."""
    weights = base_weights(config, num_critics)
    if scheduled is None:
        return config.reality_weight, weights
    now = [scheduled.critic_factors[i] * weight for i, weight in enumerate(weights)]
    return config.reality_weight + sum(weight - part for weight, part in zip(weights, now, strict=True)), now


def distillation_shares(
    config: BaselineConfig, num_critics: int, scheduled: Scheduled | None
) -> tuple[Weight, Sequence[Weight]]:
    """The weight of cross-entropy, and that of each critic's divergence."""
    share = (1 - config.distillation_alpha) / max(1, num_critics)
    if scheduled is None:
        return config.distillation_alpha, [share] * num_critics
    now = [scheduled.critic_factors[i] * share for i in range(num_critics)]
    return 1 - sum(now), now


def weighted(weight: Weight, log_probs: Tensor) -> Tensor:
    """weight · log p, and 0 where a weight of 0 meets −∞."""
    if isinstance(weight, Tensor):
        return torch.where(weight > 0, weight * log_probs, 0.0)
    return weight * log_probs
