"""Settings that change from step to step, as tensors: a new value needs no new graph and no wait for the device."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Scheduled(NamedTuple):
    """The values of one step; each replaces or scales the setting it is named after."""

    critic_factors: Tensor  # (C,) in (0, 1], what each critic's weight is multiplied by; the text gains what they lose
    smoothing: Tensor  # ()
    entropy_coef: Tensor  # ()


Weight = float | Tensor
