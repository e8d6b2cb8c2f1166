"""The policy π at N positions: a softmax and its gradient, without another (N, V) tensor beside the logits.

All else that an objective does concerns a few actions per position, so these functions decide what a loss costs.

Shapes: N positions, V vocabulary, S tokens. Logits come in any floating dtype; the computing is in float32 or float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .schedule import Weight

# log π is never below this: exp makes it an exact 0 in every dtype, and 0 · log π stays 0.
LOWEST_LOG_PROB = -(2.0**64)
# On a CPU, logits that are read several times are read in parts of so many; timed from 2^16 to 2^22 (docs/lab-log.md).
CACHED_ELEMENTS = 2**20


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32 for half precision, otherwise the input's own."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


class DenseTail(NamedTuple):
    """What a critic's whole distribution adds to the rewards: amount · p_C(a) for every token of the vocabulary."""

    logits: Tensor  # (N, V)
    largest: Tensor  # (N,), of the logits
    log_total: Tensor  # (N,), log Σ exp(logits − largest)
    amount: Tensor  # (N,)

    def rewards(self, tokens: Tensor | None = None) -> Tensor:
        """What it adds at tokens (N, S), or at every token (N, V)."""
        logits = self.logits if tokens is None else self.logits.gather(1, tokens)
        amount = self.amount * (-self.log_total).exp()
        return (logits - self.largest.unsqueeze(1)).exp_().mul_(amount.unsqueeze(1))

    def rows(self, part: slice) -> DenseTail:
        """The same of some positions."""
        return DenseTail(*(column[part] for column in self))


class Policy(NamedTuple):
    """π, the softmax of logits / temperature at N positions."""

    logits: Tensor  # (N, V)
    temperature: float
    largest: Tensor  # (N,), of the logits
    log_total: Tensor  # (N,), log Σ exp((logits − largest) / temperature)
    entropy: Tensor  # (N,) nats
    compiled: bool  # whether passes over the logits go through torch.compile

    @classmethod
    def of(cls, logits: Tensor, temperature: float = 1.0, compiled: bool = False) -> Policy:
        """The softmax of ``logits / temperature``."""
        if compiled:
            statistics = _compiled(softmax_statistics)(logits, temperature)
        else:
            parts = [softmax_statistics(logits[part], temperature) for part in _parts_in_cache(logits)]
            statistics = [torch.cat(column) for column in zip(*parts, strict=True)]
        return cls(logits, temperature, *statistics, compiled)

    def log_probs(self, tokens: Tensor | None = None) -> Tensor:
        """log π of tokens (N, S), or of every token (N, V); finite, so that 0 · log 0 = 0."""
        logits = self.logits if tokens is None else self.logits.gather(1, tokens)
        log_probs = shifted(logits, self.largest, self.temperature).sub_(self.log_total.unsqueeze(1))
        return log_probs.clamp_(min=LOWEST_LOG_PROB)

    def gradient_(
        self,
        weights: Tensor,
        total: Tensor,
        tokens: Tensor,
        amounts: Tensor,
        bonus: Weight = 0.0,
        tails: Sequence[DenseTail] = (),
    ) -> Tensor:
        """weights · [π · (total + bonus · (log π + H)) − amounts at tokens − tails], (N, V), written over the logits.

        It is the gradient of a weighted sum of −log π(token) and an entropy bonus. ``weights`` and ``total`` are (N,),
        ``tokens`` and ``amounts`` (N, S); a repeated token takes the sum of its amounts. What ``tails`` hold of a token
        comes on top of its amounts.
        """
        share = weights * (-self.log_total).exp()  # π = exp(s) / total and log π = s − log total, with s shifted logits
        constant = share * (total + bonus * (self.entropy - self.log_total))
        slope = share * bonus if isinstance(bonus, Tensor) or bonus else None
        amounts = weights.unsqueeze(1) * amounts
        tails = [tail._replace(amount=weights * tail.amount) for tail in tails]
        if self.logits.dtype == amounts.dtype:
            return self._softmax_gradient_(constant, slope, tails).scatter_add_(1, tokens, -amounts)
        # In half precision the difference must be taken before it is rounded: where π is near 1 it is all that is left.
        tokens, _, taken = sums_of_each(tokens, amounts)
        below = shifted(self.logits.gather(1, tokens), self.largest, self.temperature).clamp_(min=LOWEST_LOG_PROB)
        slopes = constant.unsqueeze(1) + (0 if slope is None else slope.unsqueeze(1) * below)
        taken = taken + sum(tail.rewards(tokens) for tail in tails)
        differences = (below.exp() * slopes - taken).to(self.logits.dtype)
        return self._softmax_gradient_(constant, slope, tails).scatter_(1, tokens, differences)

    def _softmax_gradient_(self, constant: Tensor, slope: Tensor | None, tails: Sequence[DenseTail]) -> Tensor:
        """exp(s) · (constant + slope · s) − Σ tails over the logits, s being these shifted; no ``slope`` means 0."""
        if self.compiled and not tails:
            _compiled(_write_softmax_gradient)(self.logits, self.temperature, self.largest, constant, slope)
            return self.logits
        for part in _parts_in_cache(self.logits):
            rows, of_slope = self.logits[part], None if slope is None else slope[part]
            gradient = softmax_gradient(rows, self.temperature, self.largest[part], constant[part], of_slope)
            for tail in tails:
                gradient = gradient - tail.rows(part).rewards()
            rows.copy_(gradient)
        return self.logits

    def tail_sums(self, tails: Sequence[DenseTail]) -> tuple[Tensor, Tensor]:
        """Σ r log π and Σ r π of what ``tails`` hold of the whole vocabulary, (N,) each; 0 without any."""
        likelihood, expected = torch.zeros_like(self.entropy), torch.zeros_like(self.entropy)
        for tail in tails:
            for part in _parts_in_cache(self.logits):
                rows = self._replace(
                    logits=self.logits[part], largest=self.largest[part], log_total=self.log_total[part]
                )
                log_probs = rows.log_probs()
                amounts = tail.rows(part).rewards().to(log_probs.dtype)
                likelihood[part] += torch.linalg.vecdot(amounts, log_probs)
                expected[part] += torch.linalg.vecdot(amounts, log_probs.exp_())
        return likelihood, expected

    def metrics(self, targets: Tensor) -> dict[str, Tensor]:
        """Cross-entropy and entropy (N,) in nats."""
        return {"cross_entropy": -self.log_probs(targets.unsqueeze(1)).squeeze(1), "entropy": self.entropy}


def softmax_statistics(logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits z (N, V): the largest, log Σ exp((z − largest) / temperature) and the softmax's entropy, (N,) each.

    The first two are never added up: one large number would round the small one away.
    """
    largest = logits.amax(dim=1).to(compute_dtype(logits.dtype))
    below = shifted(logits, largest, temperature).clamp_(min=LOWEST_LOG_PROB)  # −∞: what is impossible adds nothing
    weights = below.exp()
    total = weights.sum(dim=1)
    log_total = total.log()
    return largest, log_total, log_total - weights.mul_(below).sum(dim=1) / total


def softmax_gradient(
    logits: Tensor, temperature: float, largest: Tensor, constant: Tensor, slope: Tensor | None
) -> Tensor:
    """exp(s) · (constant + slope · s) with s = (logits − largest) / temperature, in the computing dtype.

    ``largest``, ``constant`` and ``slope`` are (N,); ``logits`` (N, V) may be overwritten.
    """
    into = logits if logits.dtype == largest.dtype else None
    below = shifted(logits, largest, temperature, into).clamp_(min=LOWEST_LOG_PROB)
    if slope is None:
        return below.exp_().mul_(constant.unsqueeze(1))
    weights = below.exp()
    return below.mul_(slope.unsqueeze(1)).add_(constant.unsqueeze(1)).mul_(weights)


def _write_softmax_gradient(logits: Tensor, *columns: Tensor | float | None) -> None:
    logits.copy_(softmax_gradient(logits, *columns))


@functools.cache  # torch.compile itself takes seconds to import
def _compiled(function: Callable) -> Callable:
    """``function`` as one pass over the logits: C++ on a CPU, Triton on a GPU, made at the first call.

    Shapes are symbols: the last chunk may be shorter, and a new shape need not cost a new compilation.
    """
    return torch.compile(function, dynamic=True)


def shifted(logits: Tensor, largest: Tensor, temperature: float, out: Tensor | None = None) -> Tensor:
    """(logits (N, S) − largest (N,)) / temperature in the dtype of ``largest``, that to compute in."""
    # The difference first: a large offset that all logits share would leave little of what they differ by.
    difference = torch.sub(logits, largest.unsqueeze(1), out=out)
    return difference if temperature == 1 else difference.div_(temperature)


def sums_of_each(tokens: Tensor, amounts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``tokens`` (N, S) in order, which of them come for the first time, and the sum of the amounts of all alike."""
    tokens, order = tokens.sort(dim=1)
    is_first = torch.cat([torch.ones_like(tokens[:, :1], dtype=torch.bool), tokens[:, 1:] != tokens[:, :-1]], dim=1)
    group = is_first.cumsum(dim=1) - 1  # (N, S)
    sums = torch.zeros_like(amounts).scatter_add_(1, group, amounts.gather(1, order))
    return tokens, is_first, sums.gather(1, group)


def largest_of_tails(tails: Sequence[DenseTail]) -> Tensor:
    """The most that ``tails`` together add for any token of the vocabulary (N,)."""
    parts = _parts_in_cache(tails[0].logits)
    return torch.cat([sum(tail.rows(part).rewards() for tail in tails).amax(dim=1) for part in parts])


def _parts_in_cache(logits: Tensor) -> Sequence[slice]:
    """Rows of logits (N, V) that stay in a CPU's cache together with what is computed of them; else all at once."""
    if logits.device.type != "cpu" or torch.compiler.is_compiling():
        return (slice(None),)
    step = max(1, CACHED_ELEMENTS // logits.shape[1])
    return [slice(start, start + step) for start in range(0, len(logits), step)] or (slice(None),)
