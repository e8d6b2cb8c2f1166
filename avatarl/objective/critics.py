"""What rewards ask of a critic, answered by its logits or by what a cache kept of them.

Three questions: which tokens it proposes, how probable it finds given tokens, and, where its distribution is not cut to
the active actions, a sample of what lies outside of them.

Shapes: N positions, V vocabulary, A active actions, S sampled tokens. Probabilities are over the whole vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import compute_dtype
from .stored import StoredCritic, reaching
from .top_k import top_k


class LiveCritic:
    """A critic that is asked itself, by its logits (N, V) in any floating dtype."""

    def __init__(self, logits: Tensor, normaliser: tuple[Tensor, Tensor] | None = None):
        """``normaliser`` of its softmax, where it is known already."""
        self.logits, self._normaliser = logits, normaliser

    @property
    def normaliser(self) -> tuple[Tensor, Tensor]:
        """Its largest logit and log Σ exp(logits − largest), (N,) each; taken when first asked for."""
        if self._normaliser is None:
            self._normaliser = _normaliser(self.logits, self.logits.amax(dim=1))
        return self._normaliser

    def proposals(self, k: int, top_p: float | None) -> tuple[Tensor, Tensor]:
        """Its ``k`` most likely tokens in falling order, and which of them ``top_p`` keeps; both (N, k)."""
        return proposals(self.logits, k, top_p)

    def log_probs_at(
        self, actions: Tensor, dtype: torch.dtype, normalised: bool = True, by_draws: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities (N, A), only up to a constant per position unless ``normalised``; none is an estimate."""
        scores = self.logits.gather(1, actions).to(compute_dtype(self.logits.dtype))
        if not normalised:  # its favourite is among the actions
            return (scores - scores.amax(dim=1, keepdim=True)).to(dtype), None
        largest, log_total = (part.unsqueeze(1) for part in self.normaliser)
        return (scores - largest - log_total).to(dtype), None

    def log_outside(self, actions: Tensor, valid: Tensor, log_probs: Tensor) -> Tensor:
        """Log of the probability (N, 1) of all tokens but the valid ``actions`` (N, A), whose ``log_probs`` are known.

        Summed over the others: one minus the sum of the actions' would be rounding where these have nearly everything.
        """
        largest, log_total = (part.unsqueeze(1) for part in self.normaliser)
        others = (self.logits - largest).scatter_(1, torch.where(valid, actions, actions[:, :1]), -torch.inf)
        return (others.logsumexp(dim=1, keepdim=True) - log_total).to(log_probs.dtype)

    def sample_outside(self, actions: Tensor, valid: Tensor, samples: int, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens drawn from what the critic believes outside of the valid actions, and the mass each stands for.

        They are drawn systematically, at the points (u + 0) / S, (u + 1) / S, … of the distribution: a token's expected
        mass is its probability, as with independent draws, and its variance smaller.

        Args:
            actions: (N, A) int64.
            valid: (N, A) bool.
            samples: S.
            uniforms: (N, 1) in [0, 1).

        Returns:
            tokens: (N, S) int64; some may be alike.
            mass: (N, S), each 1/S of the probability outside of the actions.
        """
        largest, log_total = (part.unsqueeze(1) for part in self.normaliser)
        weights = (self.logits - largest).exp_()
        # Repeated columns write where the valid one of their token writes.
        weights.scatter_(1, torch.where(valid, actions, actions[:, :1]), 0.0)
        cumulative = weights.cumsum(dim=1)
        outside, dtype = cumulative[:, -1:], cumulative.dtype
        steps = torch.arange(samples, device=weights.device, dtype=dtype)
        points = ((uniforms.to(dtype) + steps) / samples * outside).contiguous()
        # A product that rounds to the whole would be beyond the last token that has a part in it.
        points = torch.minimum(points, outside.nextafter(torch.zeros_like(outside)))
        tokens = torch.searchsorted(cumulative, points, right=True).clamp(max=weights.shape[1] - 1)
        return tokens, (outside * (-log_total).exp() / samples).expand(-1, samples)


def as_asked(critic: Tensor | StoredCritic) -> LiveCritic | StoredCritic:
    """A critic that answers, from its logits (N, V) or from what is stored."""
    return critic if isinstance(critic, StoredCritic) else LiveCritic(critic)


def proposals(logits: Tensor, k: int, top_p: float | None) -> tuple[Tensor, Tensor]:
    """A model's ``k`` most likely tokens in falling order, and which of them ``top_p`` keeps; both (N, k)."""
    values, tokens = top_k(logits, k)
    if top_p is None or top_p == 1:  # a sum that reaches exactly 1 would be an accident of rounding
        return tokens, torch.ones_like(tokens, dtype=torch.bool)
    largest, log_total = (part.unsqueeze(1) for part in _normaliser(logits, values[:, 0]))
    return tokens, reaching((values - largest - log_total).exp(), top_p)


def _normaliser(logits: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """``largest`` (N,) of logits (N, V) and log Σ exp(logits − largest), in the dtype to compute in."""
    largest = largest.to(compute_dtype(logits.dtype))
    return largest, (logits - largest.unsqueeze(1)).exp_().sum(dim=1).log()
