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
from .folder.log import MetricSums
from .processes import Processes
from .rewarded_player import RewardedPlayer

IGNORED = -100


class Validation:
    """A choice of validation windows, spread evenly over the split, and the means of all metrics over them."""

    def __init__(self, windows: Windows, config: TrainConfig, device: torch.device, processes: Processes):
        count = len(windows) if config.eval_windows is None else min(config.eval_windows, len(windows))
        self._chosen = np.linspace(0, len(windows) - 1, count).round().astype(np.int64)
        self._windows, self._config, self._device, self._processes = windows, config, device, processes

    @torch.no_grad()
    def evaluate(self, model: RewardedPlayer, autocast: AbstractContextManager) -> dict[str, float]:
        """Metrics per position, without dropout; ``cross_entropy`` is the one that chooses the best player."""
        model.eval()
        sums = MetricSums()
        for inputs, targets, draws in self._batches(model.objective.num_draws):
            with autocast:
                _, metrics = model(inputs, targets, 1, draws)
            sums.add(metrics)
        positions = len(self._chosen) * self._config.block / self._processes.count
        return {name: value / positions for name, value in sums.over(self._processes).items()}

    def _batches(self, num_draws: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """This process's windows. Divided players take every pass together, so that some may repeat one, ignored."""
        config, processes = self._config, self._processes
        mine = self._chosen[processes.rank :: processes.count]
        most = len(self._chosen[:: processes.count])
        for start in range(0, most, config.batch_windows):
            indices = mine[start : start + config.batch_windows]
            is_ignored = len(indices) == 0
            if is_ignored:
                indices = self._chosen[:1]
            draws = uniform_draws(config.seed, indices, config.block, num_draws, evaluation=True)
            inputs, targets = self._windows.batch(indices)
            if is_ignored:
                targets.fill_(IGNORED)
            yield tuple(None if x is None else x.to(self._device) for x in (inputs, targets, draws))
