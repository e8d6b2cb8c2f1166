"""Sums of metrics on the device, over micro-batches and steps."""

from __future__ import annotations

import torch
from torch import Tensor

from .processes import Processes


class MetricSums:
    """Sums of metrics on the device; only :meth:`over` waits for it."""

    def __init__(self, sums: dict[str, float] | None = None):
        self.sums: dict[str, Tensor | float] = dict(sums or {})

    def __getitem__(self, name: str) -> Tensor | float:
        return self.sums[name]

    def add(self, metrics: dict[str, Tensor], leave_out: Tensor | bool = False) -> None:
        """Add values (), or nothing where ``leave_out`` () says so."""
        for name, value in metrics.items():
            value = value.detach()
            if isinstance(leave_out, Tensor):
                value = value.masked_fill(leave_out, 0.0)
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def over(self, processes: Processes) -> dict[str, float]:
        """Each sum as the mean over processes."""
        if not self.sums:
            return {}
        device = next((value.device for value in self.sums.values() if isinstance(value, Tensor)), None)
        sums = [torch.as_tensor(value, dtype=torch.float64, device=device) for value in self.sums.values()]
        return dict(zip(self.sums, processes.mean(torch.stack(sums)).tolist(), strict=True))
