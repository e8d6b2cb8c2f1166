"""Settings that change from step to step, as tensors: a new value needs no new graph and no wait for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .config import AvataRLConfig, BaselineConfig


class Scheduled(NamedTuple):
    """The values of one step; each replaces or scales the setting it is named after."""

    critic_factors: Tensor  # (C,) in (0, 1], what each critic's weight is multiplied by; the text gains what they lose
    smoothing: Tensor  # ()
    entropy_coef: Tensor  # ()


Weight = float | Tensor


def expert_weights(
    config: AvataRLConfig, num_critics: int, scheduled: Scheduled | None
) -> tuple[Weight | None, Sequence[Weight | None]]:
    """The weight of the text, and that of each critic; None for one that never has any.

    Their sum does not change over time. :meth:`AvataRLConfig.critic_weights` has checked their number.
    """
    weight, text = config.critic_weight, config.reality_weight
    weights = weight if isinstance(weight, tuple) else (weight / max(1, num_critics),) * num_critics
    weights = weights if num_critics else ()
    if scheduled is None:
        return text or None, [weight or None for weight in weights]
    now = [scheduled.critic_factors[i] * weight for i, weight in enumerate(weights)]
    text = text + sum(weight - part for weight, part in zip(weights, now, strict=True))
    return text, [part if weight else None for weight, part in zip(weights, now, strict=True)]


def distillation_shares(
    config: BaselineConfig, num_critics: int, scheduled: Scheduled | None
) -> tuple[Weight, Sequence[Weight]]:
    """The weight of cross-entropy, and that of each critic's divergence."""
    share = (1 - config.distillation_alpha) / max(1, num_critics)
    if scheduled is None:
        return config.distillation_alpha, [share] * num_critics
    now = [scheduled.critic_factors[i] * share for i in range(num_critics)]
    return 1 - sum(now), now
