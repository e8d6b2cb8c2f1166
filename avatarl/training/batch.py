"""What one forward pass of player, critics and objective reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from avatarl.device import send


class Batch(NamedTuple):
    """Some windows of one split."""

    inputs: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64
    uniforms: Tensor | None  # (B·T, S) in [0, 1), for objectives that sample
    split: str  # train or valid
    indices: Sequence[int]  # of the windows in it
    others: Mapping[str, Any] = MappingProxyType({})  # what else models read beside the tokens

    def to(self, device: torch.device) -> Batch:
        """The same on ``device``."""
        uniforms = None if self.uniforms is None else send(self.uniforms, device)
        return self._replace(inputs=send(self.inputs, device), targets=send(self.targets, device), uniforms=uniforms)
