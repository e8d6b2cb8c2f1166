"""The kernels, each made one pass over the logits by ``torch.compile``: C++ on a CPU, Triton on a GPU.

Only these small functions are compiled, in seconds, and not the objective around them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import Kernels, policy_gradient, softmax_statistics
from ..rewards import DenseTail


class CompiledKernels(Kernels):
    """What :class:`Kernels` computes, compiled at the first call; needs a C++ compiler on a CPU."""

    def statistics(self, logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        return _statistics(logits, temperature)

    def gradient_(
        self,
        logits: Tensor,
        temperature: float,
        largest: Tensor,
        constant: Tensor,
        bonus: Tensor | None,
        tails: Sequence[DenseTail] = (),
    ) -> Tensor:
        if tails:
            return super().gradient_(logits, temperature, largest, constant, bonus, tails)
        _write_gradient(logits, temperature, largest, constant, bonus)
        return logits


# Shapes are symbols: the last chunk may be shorter, and a new shape need not cost a new compilation.
_statistics = torch.compile(softmax_statistics, dynamic=True)


@torch.compile(dynamic=True)
def _write_gradient(
    logits: Tensor, temperature: float, largest: Tensor, constant: Tensor, bonus: Tensor | None
) -> None:
    logits.copy_(policy_gradient(logits, temperature, largest, constant, bonus))
