"""Evaluation during training: the objective's own metrics on validation windows that are always the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager

import torch

from avatarl.data import Windows, spread
from avatarl.models import CriticCache
from avatarl.objective import Scheduled

from .batch import Batch
from .config import TrainConfig
from .draws import uniform_draws
from .metrics import MetricSums
from .processes import Processes
from .rewarded_player import RewardedPlayer
from .schedule import Stage

IGNORED = -100


class Validation:
    """A choice of validation windows, spread evenly over the split, and the means of all metrics over them."""

    def __init__(
        self,
        windows: Windows,
        config: TrainConfig,
        device: torch.device,
        processes: Processes,
        caches: Mapping[int, CriticCache],
    ):
        self._chosen = spread(len(windows), config.eval_windows)
        self._windows, self._config, self._device, self._processes = windows, config, device, processes
        self._caches = caches

    @torch.no_grad()
    def evaluate(
        self, model: RewardedPlayer, stage: Stage, scheduled: Scheduled | None, autocast: AbstractContextManager
    ) -> dict[str, float]:
        """Metrics per position, without dropout; ``cross_entropy`` is the one that chooses the best player."""
        model.eval()
        sums = MetricSums()
        for batch in self._batches(stage, scheduled):
            with autocast:
                _, metrics = model(batch.inputs, batch.targets, 1, batch.draws, batch.stored, batch.scheduled)
            sums.add(metrics)
        positions = len(self._chosen) * self._config.block_size / self._processes.count
        return {name: value / positions for name, value in sums.over(self._processes).items()}

    def _batches(self, stage: Stage, scheduled: Scheduled | None) -> Iterator[Batch]:
        """This process's windows. Divided players take every pass together, so that some may repeat one, ignored."""
        config, processes = self._config, self._processes
        caches = [self._caches[i] for i in stage.critics if i in self._caches]
        mine = self._chosen[processes.rank :: processes.count]
        most = len(self._chosen[:: processes.count])
        for start in range(0, most, config.micro_batch_size):
            indices = mine[start : start + config.micro_batch_size]
            is_ignored = len(indices) == 0
            if is_ignored:
                indices = self._chosen[:1]
            draws = uniform_draws(config.seed, indices, config.block_size, stage.objective.num_draws, evaluation=True)
            inputs, targets = self._windows.batch(indices)
            if is_ignored:
                targets.fill_(IGNORED)
            stored = [cache.rows("valid", indices) for cache in caches]
            yield Batch(inputs, targets, draws, stored, scheduled).to(self._device)
