"""Evaluation during training: the objective's own metrics on validation windows that are always the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

from avatarl.data import Windows

from .config import TrainConfig
from .draws import uniform_draws
from .rewarded_player import RewardedPlayer
from .runlog import MetricSums


class Validation:
    """A choice of validation windows, spread evenly over the split, and the means of all metrics over them."""

    def __init__(self, windows: Windows, config: TrainConfig, device: torch.device):
        count = len(windows) if config.eval_windows is None else min(config.eval_windows, len(windows))
        self._chosen = np.linspace(0, len(windows) - 1, count).round().astype(np.int64)
        self._windows, self._config, self._device = windows, config, device

    @torch.no_grad()
    def evaluate(self, model: RewardedPlayer, autocast: AbstractContextManager) -> dict[str, float]:
        """Metrics per position, without dropout; ``cross_entropy`` is the one that chooses the best player."""
        model.eval()
        sums, positions = MetricSums(), 0
        for inputs, targets, draws in self._batches(model.objective.num_draws):
            with autocast:
                _, metrics = model(inputs, targets, 1, draws)
            sums.add(metrics)
            positions += targets.numel()
        return sums.means(positions)

    def _batches(self, num_draws: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        config = self._config
        for start in range(0, len(self._chosen), config.batch_windows):
            indices = self._chosen[start : start + config.batch_windows]
            draws = uniform_draws(config.seed, indices, config.block, num_draws, evaluation=True)
            yield tuple(None if x is None else x.to(self._device) for x in (*self._windows.batch(indices), draws))
