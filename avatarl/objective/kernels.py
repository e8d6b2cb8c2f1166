"""The work that reads every logit of a position: top-K, the softmax's statistics and the policy's gradient.

All else an objective does concerns a few actions per position. These few functions therefore decide what an objective
costs, and are what other implementations replace (:mod:`avatarl.objective.fused`). This is the plain one, in eager
PyTorch.

Shapes: N positions, V vocabulary. Logits come in any floating dtype; all computing is in float32 or float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import compute_dtype
from .config import AvataRLConfig
from .rewards import DenseTail, Judgement, judge
from .schedule import Scheduled
from .stored import StoredCritic

# log π is never below this: exp makes it an exact 0 in every dtype, and 0 · log π stays 0.
LOWEST_LOG_PROB = -(2.0**64)
# Logits that are read several times are read in parts of so many on a CPU; timed from 2^16 to 2^22 (docs/lab-log.md).
CACHED_ELEMENTS = 2**20


class Kernels:
    """Plain PyTorch. Subclasses compute the same things in other ways."""

    def check_device(self, device_type: str) -> None:
        """Raise a ValueError where these kernels do not run on such a device."""

    def judge(
        self,
        player: Tensor,
        critics: Sequence[Tensor | StoredCritic],
        targets: Tensor,
        config: AvataRLConfig,
        uniforms: Tensor | None = None,
        scheduled: Scheduled | None = None,
    ) -> Judgement:
        """Actions, which of them are valid, and their rewards; see :func:`judge`."""
        return judge(player, critics, targets, config, uniforms, scheduled)

    def statistics(self, logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """The softmax of logits (N, V) / temperature: its log normaliser and its entropy in nats, (N,) each."""
        parts = [softmax_statistics(rows, temperature) for rows in _rows_in_cache(logits, logits)]
        log_normalisers, entropies = zip(*parts, strict=True)
        return torch.cat(log_normalisers), torch.cat(entropies)

    def gradient_(
        self,
        logits: Tensor,
        temperature: float,
        log_normaliser: Tensor,
        constant: Tensor,
        bonus: Tensor | None,
        tails: Sequence[DenseTail] = (),
    ) -> Tensor:
        """Write π · (constant + bonus · log π) − Σ amount · p_C over ``logits`` (N, V) and return them.

        ``constant`` and ``bonus`` are (N,); no ``bonus`` means 0. Each of ``tails`` has its critic's p_C.
        """
        columns = [_rows_in_cache(logits, column) for column in (logits, log_normaliser, constant)]
        bonuses = [None] * len(columns[0]) if bonus is None else _rows_in_cache(logits, bonus)
        parts = [_tails_in_cache(logits, tails, number) for number in range(len(columns[0]))]
        for rows, normaliser, rows_constant, rows_bonus, rows_tails in zip(*columns, bonuses, parts, strict=True):
            gradient = policy_gradient(rows, temperature, normaliser, rows_constant, rows_bonus)
            for tail in rows_tails:
                gradient = gradient - tail.everywhere()
            rows.copy_(gradient)
        return logits

    def tail_sums(
        self, logits: Tensor, temperature: float, log_normaliser: Tensor, tail: DenseTail
    ) -> tuple[Tensor, Tensor]:
        """Σ amount · p_C · log π and Σ amount · p_C · π over the vocabulary, (N,) each."""
        likelihoods, expected = [], []
        columns = [_rows_in_cache(logits, column) for column in (logits, log_normaliser)]
        for number, (rows, normaliser) in enumerate(zip(*columns, strict=True)):
            amounts = _tails_in_cache(logits, [tail], number)[0].everywhere()
            log_probs = (scaled_logits(rows, temperature) - normaliser.unsqueeze(1)).clamp_(min=LOWEST_LOG_PROB)
            amounts = amounts.to(log_probs.dtype)
            likelihoods.append(torch.linalg.vecdot(amounts, log_probs))
            expected.append(torch.linalg.vecdot(amounts, log_probs.exp_()))
        return torch.cat(likelihoods), torch.cat(expected)


def _tails_in_cache(logits: Tensor, tails: Sequence[DenseTail], number: int) -> list[DenseTail]:
    """The rows of ``tails`` that belong to part ``number`` of ``logits``."""
    return [DenseTail(*(_rows_in_cache(logits, column)[number] for column in tail)) for tail in tails]


def _rows_in_cache(logits: Tensor, column: Tensor) -> Sequence[Tensor]:
    """``column`` (N, …) in parts, such that the same rows of ``logits`` and what is computed of them stay in cache."""
    if logits.device.type != "cpu" or torch.compiler.is_compiling():
        return (column,)
    return column.split(max(1, CACHED_ELEMENTS // logits.shape[1]))


def softmax_statistics(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """See :meth:`Kernels.statistics`."""
    scaled = scaled_logits(logits, temperature)
    largest = scaled.amax(dim=1, keepdim=True)
    shifted = (scaled - largest).clamp_(min=LOWEST_LOG_PROB)  # −∞ too: what is impossible adds nothing
    weights = shifted.exp()
    total = weights.sum(dim=1)
    log_total = total.log()
    return largest.squeeze(1) + log_total, log_total - weights.mul_(shifted).sum(dim=1) / total


def policy_gradient(
    logits: Tensor, temperature: float, log_normaliser: Tensor, constant: Tensor, bonus: Tensor | None
) -> Tensor:
    """See :meth:`Kernels.gradient_`; ``logits`` may be overwritten, and the result is in the computing dtype."""
    scaled = scaled_logits(logits, temperature)
    log_probs = scaled.sub_(log_normaliser.unsqueeze(1)).clamp_(min=LOWEST_LOG_PROB)
    if bonus is None:
        return log_probs.exp_().mul_(constant.unsqueeze(1))
    probs = log_probs.exp()
    return log_probs.mul_(bonus.unsqueeze(1)).add_(constant.unsqueeze(1)).mul_(probs)


def scaled_logits(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature in the computing dtype; ``logits`` themselves where nothing changes."""
    logits = logits.to(compute_dtype(logits.dtype))
    return logits if temperature == 1 else logits / temperature


PLAIN = Kernels()
