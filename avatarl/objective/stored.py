"""What a cache keeps of a critic at a position, and what can still be answered from that.

Shapes: N positions, V vocabulary, A active actions, P most likely tokens, S drawn tokens. Probabilities are over the
whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class StoredCritic(NamedTuple):
    """What a cache holds of a critic at positions with any leading dimensions (…).

    The target is always among the stored tokens. What the stored ones leave out is known by its mass, which is shared
    among other tokens by their frequency, or by tokens that were drawn from it, each standing for an equal part.
    """

    tokens: Tensor  # (…, 1 + P) int64: the target, then the critic's P most likely tokens in falling order
    log_probs: Tensor  # (…, 1 + P) float32
    log_rest: Tensor  # (…) float32, log of the mass outside of the stored tokens; −∞ where there is none
    draws: Tensor  # (…, S) int64, drawn outside of the stored tokens; some may be alike
    entropy: Tensor  # (…) float32, nats, of the critic's whole distribution
    log_frequencies: Tensor  # (V,) float32, of tokens in the training text, the same for all positions

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.log_frequencies)

    @property
    def num_top(self) -> int:
        """P, how many of the critic's most likely tokens are kept."""
        return self.tokens.shape[-1] - 1

    @property
    def num_draws(self) -> int:
        """S, how many tokens were drawn at a position."""
        return self.draws.shape[-1]

    def flat(self) -> StoredCritic:
        """The same with the leading dimensions as one."""
        return self._replace(
            tokens=self.tokens.flatten(0, -2),
            log_probs=self.log_probs.flatten(0, -2),
            log_rest=self.log_rest.flatten(),
            draws=self.draws.flatten(0, -2),
            entropy=self.entropy.flatten(),
        )

    def rows(self, chunk: slice) -> StoredCritic:
        """Some of the positions."""
        return StoredCritic(*(tensor[chunk] for tensor in self[:-1]), self.log_frequencies)

    def map(self, change: Callable[[Tensor], Tensor]) -> StoredCritic:
        """The same with each of its tensors changed, as for another device."""
        return StoredCritic(*(change(tensor) for tensor in self))

    def proposals(self, k: int, top_p: float | None) -> tuple[Tensor, Tensor]:
        """See :meth:`LiveCritic.proposals`; fewer than ``k`` where fewer are stored."""
        tokens, log_probs = self.tokens[:, 1 : 1 + k], self.log_probs[:, 1 : 1 + k]
        kept = torch.ones_like(tokens, dtype=torch.bool)
        if top_p is not None and top_p < 1:
            kept = reaching(log_probs.exp(), top_p)
        return tokens, kept

    def log_probs_at(
        self, actions: Tensor, dtype: torch.dtype, normalised: bool = True, by_draws: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities (N, A), and which of them are estimates, bool (N, A).

        A stored token has its own. Another has a part of the mass that is left, in proportion to its frequency (as
        Katz, 1987, backs off to unigrams), but no more than the least likely of the stored ones. Or, ``by_draws``, its
        part of the tokens that were drawn, −∞ for none: its expected probability is then its probability.
        """
        same = actions.unsqueeze(2) == self.tokens.unsqueeze(1)  # (N, A, 1 + P)
        is_stored = same.any(dim=2)
        # The target may be stored twice, with the same number.
        log_probs = torch.where(same, self.log_probs.to(dtype).unsqueeze(1), -torch.inf).amax(dim=2)
        log_rest = self.log_rest.to(dtype).unsqueeze(1)  # (N, 1)
        if by_draws:
            times = (actions.unsqueeze(2) == self.draws.unsqueeze(1)).sum(dim=2).to(dtype)
            estimate = log_rest + (times / self.num_draws).log()
        else:
            frequencies = self.log_frequencies.double().exp()  # where all but one are stored, float32 would lose that
            known = frequencies[self.tokens].masked_fill(self._repeats, 0.0)
            others = (frequencies.sum() - known.sum(dim=1, keepdim=True)).clamp(min=torch.finfo(torch.float64).tiny)
            estimate = self.log_frequencies[actions].to(dtype) + log_rest - others.log().to(dtype)
            if self.num_top:
                estimate = torch.minimum(estimate, self.log_probs[:, -1:].to(dtype))
        return torch.where(is_stored, log_probs, estimate), ~is_stored

    def estimate(self) -> tuple[Tensor, Tensor]:
        """The distribution as far as it is known: tokens and their mass, (N, 1 + P + S) each.

        A token may come several times, and its mass is the sum. With drawn tokens the expected mass of each token is
        its probability.
        """
        probs = self.log_probs.exp().masked_fill(self._repeats, 0.0)
        each = (self.log_rest.exp() / max(1, self.num_draws)).unsqueeze(1).expand_as(self.draws)
        return torch.cat([self.tokens, self.draws], dim=1), torch.cat([probs, each], dim=1)

    @property
    def _repeats(self) -> Tensor:
        """The place (N, 1 + P) of the target among the most likely, where it would count twice."""
        return torch.nn.functional.pad(self.tokens[:, 1:] == self.tokens[:, :1], (1, 0))

    def log_outside(self, actions: Tensor, valid: Tensor, log_probs: Tensor) -> Tensor:
        """See :meth:`LiveCritic.log_outside`: the rest and what is stored outside, less what was estimated inside."""
        inside = ((self.tokens.unsqueeze(2) == actions.unsqueeze(1)) & valid.unsqueeze(1)).any(dim=2)  # (N, 1 + P)
        held = torch.cat([self.log_probs.masked_fill(inside, -torch.inf), self.log_rest.unsqueeze(1)], dim=1)
        outside = held.to(log_probs.dtype).logsumexp(dim=1, keepdim=True)
        is_estimate = ~(actions.unsqueeze(2) == self.tokens.unsqueeze(1)).any(dim=2)
        estimated = log_probs.masked_fill(~(is_estimate & valid), -torch.inf).logsumexp(dim=1, keepdim=True)
        share = (estimated.clamp(min=torch.finfo(estimated.dtype).min) - outside).exp().clamp(max=1)  # never −∞ + ∞
        return outside + torch.log1p(-share)

    def sample_outside(
        self, actions: Tensor, valid: Tensor, samples: int, uniforms: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`LiveCritic.sample_outside`: what is stored outside of the actions, then the draws outside of them.

        Nothing is drawn here. Places that hold an action have no mass, since that has it already.
        """
        tokens = torch.cat([self.tokens[:, 1:], self.draws], dim=1)  # (N, P + S)
        mass = self.log_probs[:, 1:].exp()
        if self.num_draws:
            each = (self.log_rest.exp() / self.num_draws).unsqueeze(1).expand(-1, self.num_draws)
            mass = torch.cat([mass, each], dim=1)
        inside = ((tokens.unsqueeze(2) == actions.unsqueeze(1)) & valid.unsqueeze(1)).any(dim=2)
        return tokens, mass.masked_fill(inside, 0.0)


def reaching(probs: Tensor, top_p: float) -> Tensor:
    """Which of ``probs`` (N, k), in falling order, make the shortest prefix that reaches ``top_p``."""
    before = probs.cumsum(dim=-1) - probs
    # The first token stays whatever the rounding of a sum minus its only term.
    before[:, :1].zero_()
    return ~(before >= top_p)  # a NaN stays too
