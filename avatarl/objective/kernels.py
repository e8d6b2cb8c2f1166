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

    def statistics(self, logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """Of logits z (N, V): the largest, log Σ exp((z − largest) / temperature) and the softmax's entropy, (N,) each.

        Never added up: one large number would round the small one away.
        """
        parts = [softmax_statistics(rows, temperature) for rows in _rows_in_cache(logits, logits)]
        largest, log_totals, entropies = zip(*parts, strict=True)
        return torch.cat(largest), torch.cat(log_totals), torch.cat(entropies)

    def gradient_(
        self,
        logits: Tensor,
        temperature: float,
        largest: Tensor,
        constant: Tensor,
        bonus: Tensor | None,
        tails: Sequence[DenseTail] = (),
    ) -> Tensor:
        """Write exp(s) · (constant + bonus · s) − Σ amount · p_C over ``logits`` (N, V) and return them.

        s is (logits − largest) / temperature; ``largest``, ``constant`` and ``bonus`` are (N,), no ``bonus`` means 0.
        Each of ``tails`` has its critic's p_C.
        """
        columns = [_rows_in_cache(logits, column) for column in (logits, largest, constant)]
        bonuses = [None] * len(columns[0]) if bonus is None else _rows_in_cache(logits, bonus)
        parts = [_tails_in_cache(logits, tails, number) for number in range(len(columns[0]))]
        for rows, rows_largest, rows_constant, rows_bonus, rows_tails in zip(*columns, bonuses, parts, strict=True):
            gradient = policy_gradient(rows, temperature, rows_largest, rows_constant, rows_bonus)
            for tail in rows_tails:
                gradient = gradient - tail.everywhere()
            rows.copy_(gradient)
        return logits

    def tail_sums(
        self, logits: Tensor, temperature: float, largest: Tensor, log_total: Tensor, tail: DenseTail
    ) -> tuple[Tensor, Tensor]:
        """Σ amount · p_C · log π and Σ amount · p_C · π over the vocabulary, (N,) each."""
        likelihoods, expected = [], []
        columns = [_rows_in_cache(logits, column) for column in (logits, largest, log_total)]
        for number, (rows, rows_largest, rows_total) in enumerate(zip(*columns, strict=True)):
            amounts = _tails_in_cache(logits, [tail], number)[0].everywhere()
            log_probs = shifted(rows, rows_largest, temperature).sub_(rows_total.unsqueeze(1))
            log_probs = log_probs.clamp_(min=LOWEST_LOG_PROB)
            amounts = amounts.to(log_probs.dtype)
            likelihoods.append(torch.linalg.vecdot(amounts, log_probs))
            expected.append(torch.linalg.vecdot(amounts, log_probs.exp_()))
        return torch.cat(likelihoods), torch.cat(expected)

    def largest_of_tails(self, tails: Sequence[DenseTail]) -> Tensor:
        """The most that ``tails`` together pay for any token of the vocabulary (N,)."""
        logits = tails[0].logits
        parts = [_tails_in_cache(logits, tails, number) for number in range(len(_rows_in_cache(logits, logits)))]
        return torch.cat([sum(tail.everywhere() for tail in part).amax(dim=1) for part in parts])


def _tails_in_cache(logits: Tensor, tails: Sequence[DenseTail], number: int) -> list[DenseTail]:
    """The rows of ``tails`` that belong to part ``number`` of ``logits``."""
    return [DenseTail(*(_rows_in_cache(logits, column)[number] for column in tail)) for tail in tails]


def _rows_in_cache(logits: Tensor, column: Tensor) -> Sequence[Tensor]:
    """``column`` (N, …) in parts, such that the same rows of ``logits`` and what is computed of them stay in cache."""
    if logits.device.type != "cpu" or torch.compiler.is_compiling():
        return (column,)
    return column.split(max(1, CACHED_ELEMENTS // logits.shape[1]))


def softmax_statistics(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """See :meth:`Kernels.statistics`."""
    largest = logits.amax(dim=1).to(compute_dtype(logits.dtype))
    below = shifted(logits, largest, temperature).clamp_(min=LOWEST_LOG_PROB)  # −∞: what is impossible adds nothing
    weights = below.exp()
    total = weights.sum(dim=1)
    log_total = total.log()
    return largest, log_total, log_total - weights.mul_(below).sum(dim=1) / total


def policy_gradient(
    logits: Tensor, temperature: float, largest: Tensor, constant: Tensor, bonus: Tensor | None
) -> Tensor:
    """See :meth:`Kernels.gradient_`; ``logits`` may be overwritten, and the result is in the computing dtype."""
    into = logits if logits.dtype == largest.dtype else None
    below = shifted(logits, largest, temperature, into).clamp_(min=LOWEST_LOG_PROB)
    if bonus is None:
        return below.exp_().mul_(constant.unsqueeze(1))
    weights = below.exp()
    return below.mul_(bonus.unsqueeze(1)).add_(constant.unsqueeze(1)).mul_(weights)


def shifted(logits: Tensor, largest: Tensor, temperature: float, out: Tensor | None = None) -> Tensor:
    """(logits (N, S) − largest (N,)) / temperature in the dtype of ``largest``, that to compute in."""
    # The difference first: a large offset that all logits share would leave little of what they differ by.
    difference = torch.sub(logits, largest.unsqueeze(1), out=out)
    return difference if temperature == 1 else difference.div_(temperature)


PLAIN = Kernels()
