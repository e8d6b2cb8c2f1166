"""Evaluation during training: the objective's own metrics on validation windows that are always the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch

from avatarl.data import Windows, spread
from avatarl.models import Critic
from avatarl.models.critics import Snapshot
from avatarl.objective import Scheduled

from .batches import Batch, uniforms_of
from .config import TrainConfig
from .model import PlayerWithLoss, add_metrics
from .processes import Processes

IGNORED = -100


class Validation:
    """Validation windows, spread evenly over the split, and the means of all metrics over them."""

    def __init__(self, windows: Windows, config: TrainConfig, device: torch.device, processes: Processes):
        self._chosen = spread(len(windows), config.eval_windows)
        self._windows, self._config, self._device, self._processes = windows, config, device, processes

    @torch.no_grad()
    def evaluate(
        self,
        model: PlayerWithLoss,
        critics: Sequence[Critic],
        snapshot: Snapshot | None,
        scheduled: Scheduled | None,
        autocast: AbstractContextManager,
    ) -> dict[str, float]:
        """Metrics per position, without dropout; ``cross_entropy`` chooses the best player."""
        model.eval()
        sums = {}
        for batch in self._batches(model.objective.num_uniforms):
            with autocast:
                answers = [critic.answers(batch) for critic in critics]
                earlier = snapshot.answers(batch) if snapshot else None
                _, metrics = model(batch.inputs, batch.targets, answers, 1, batch.uniforms, scheduled, earlier)
            add_metrics(sums, metrics)
        positions = len(self._chosen) * self._config.block_size / self._processes.count
        return {name: value / positions for name, value in self._processes.means(sums).items()}

    def _batches(self, num_uniforms: int) -> Iterator[Batch]:
        """This process's windows. With FSDP all processes take every pass, so some may repeat a window, ignored."""
        config, processes = self._config, self._processes
        mine = self._chosen[processes.rank :: processes.count]
        most = len(self._chosen[:: processes.count])
        for start in range(0, most, config.micro_batch_size):
            indices = mine[start : start + config.micro_batch_size]
            is_ignored = len(indices) == 0
            if is_ignored:
                indices = self._chosen[:1]
            uniforms = uniforms_of(config.seed, indices, config.block_size, num_uniforms, evaluation=True)
            inputs, targets = self._windows.batch(indices)
            if is_ignored:
                targets.fill_(IGNORED)
            yield Batch(inputs, targets, uniforms, "valid", indices).to(self._device)
