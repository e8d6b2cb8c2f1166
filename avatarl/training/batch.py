"""What one forward pass of player and objective reads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from avatarl.objective import Scheduled, StoredCritic


class Batch(NamedTuple):
    """Some windows, with all that the objective asks of them besides the player."""

    inputs: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64
    draws: Tensor | None  # (B·T, S), for objectives that sample
    stored: list[StoredCritic]  # (B, T) each, of critics that are cached
    scheduled: Scheduled | None  # on the device already

    def to(self, device: torch.device) -> Batch:
        """The same on ``device``."""

        def moved(tensor: Tensor) -> Tensor:
            # From pinned memory a GPU fetches it by itself; from other memory the host would wait for its turn.
            source = tensor.pin_memory() if device.type == "cuda" else tensor
            return source.to(device, non_blocking=True)

        draws = None if self.draws is None else moved(self.draws)
        stored = [critic.map(moved) for critic in self.stored]
        return self._replace(inputs=moved(self.inputs), targets=moved(self.targets), draws=draws, stored=stored)
