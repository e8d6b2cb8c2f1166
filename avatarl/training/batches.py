"""What each forward pass reads: windows of the data, and random numbers for objectives that sample."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from avatarl.data import WindowOrder, Windows
from avatarl.device import send

from .config import TrainConfig
from .processes import Processes


class Batch(NamedTuple):
    """Some windows of one split."""

    inputs: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64
    uniforms: Tensor | None  # (B·T, S) in [0, 1), for objectives that sample
    split: str  # train or valid
    indices: Sequence[int]  # of the windows in it
    others: Mapping[str, Any] = MappingProxyType({})  # what else models read beside the tokens

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``; it comes from host memory."""
        if device.type == "cpu":
            return self
        uniforms = None if self.uniforms is None else send(self.uniforms, device)
        return self._replace(inputs=send(self.inputs, device), targets=send(self.targets, device), uniforms=uniforms)


class Batches:
    """A process's windows of every optimiser step, in an endless order that depends on the seed alone."""

    def __init__(self, windows: Windows, config: TrainConfig, processes: Processes, device: torch.device):
        self.windows, self.order = windows, WindowOrder(len(windows), config.seed)
        self._seed, self._block_size, self._device = config.seed, config.block_size, device
        self._share = config.windows_per_process(processes.count)
        self._first = processes.rank * self._share
        self.num_passes = math.ceil(self._share / config.micro_batch_size)

    def of_step(self, start: int, num_uniforms: int) -> Iterator[Batch]:
        """The micro-batches of the step whose windows begin at place ``start`` of the order.

        They are of equal size, or one window more. A step's windows do not depend on the number of processes.
        ``num_uniforms`` are wanted for each position.
        """
        first = start + self._first
        for places in np.array_split(range(first, first + self._share), self.num_passes):
            indices = self.order.indices(places[0], len(places))
            uniforms = uniforms_of(self._seed, places, self._block_size, num_uniforms) if num_uniforms else None
            yield Batch(*self.windows.batch(indices), uniforms, "train", indices).to(self._device)


def uniforms_of(
    seed: int, windows: Iterable[int], block_size: int, samples: int, evaluation: bool = False
) -> Tensor | None:
    """Random numbers in [0, 1) for each position of each window, float32 (windows · block_size, samples).

    They depend on seed and window, never on process or device. A training window is known by its place in the endless
    order, which fixes step and window at once; an evaluation window by its index. None when ``samples`` is 0.
    """
    if samples == 0:
        return None
    # Philox is a counter-based generator: the counter names the window, and no state passes from one to the next.
    drawn = [
        np.random.Generator(np.random.Philox(key=seed, counter=[0, int(evaluation), int(window), 0])).random(
            (block_size, samples), dtype=np.float32
        )
        for window in windows
    ]
    return torch.from_numpy(np.concatenate(drawn))
