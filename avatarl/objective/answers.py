"""Answers: what a critic says of N positions.

    proposals       which tokens it finds most likely
    log_probs_at    how likely it finds given tokens
    log_outside, sample_outside, dense_tail
                    what lies outside of the active actions: its mass, a sample of it, or the whole distribution
    add_distribution_
                    the distribution as a soft target of distillation

A live critic answers by its logits (:class:`LiveAnswers`), a cached one by what was stored of them
(:class:`CachedAnswers`). :class:`HiddenAnswers` holds a live critic's hidden states and answers chunk by chunk, so that
its logits never exist for all positions at once.

Shapes: N positions, V vocabulary, A actions, P most likely tokens, S drawn tokens. Probabilities are over the whole
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from .policy import DenseTail, Policy, compute_dtype

# Below this many logits a row, torch.topk is as fast as :func:`top_k`.
SMALL_VOCABULARY = 1024


class Answers(Protocol):
    """What the loss needs of a critic, whatever kind it is."""

    limits: tuple[int, int] | None  # P and S, where the critic knows no other tokens; None where it knows all

    def check(self, targets: Tensor, width: int | None, vocab_size: int | None) -> None:
        """Raise a ValueError unless the answers fit ``targets`` (…) and a player with ``width`` output rows."""

    def are_for(self, targets: Tensor, ignore_index: int) -> bool:
        """Whether the answers can be those for ``targets`` (B, T), as far as they hold them."""

    def flat(self, vocab_size: int) -> Answers:
        """The answers with leading dimensions as one, N, and without ids from ``vocab_size`` on."""

    def cast(self, dtype: torch.dtype) -> Answers:
        """The answers in the dtype in which products are taken."""

    def reader(self, rows: int, ignored: Tensor) -> Callable[[slice], LiveAnswers | CachedAnswers]:
        """A function that gives at most ``rows`` of the positions, without NaN where they are ``ignored`` (N,)."""


class LiveAnswers:
    """A live critic, given its logits (…, V) in any floating dtype; all but ``check`` and ``flat`` take (N, V)."""

    limits: ClassVar[None] = None

    def __init__(self, logits: Tensor, normaliser: tuple[Tensor, Tensor] | None = None):
        """``normaliser`` of the softmax, where it is known already."""
        self.logits, self._normaliser = logits, normaliser

    def check(self, targets: Tensor, width: int | None, vocab_size: int | None, name: str = "critic_logits") -> None:
        _check_floating(self.logits, name)
        _check_targets(targets, self.logits, name)
        if width is not None and vocab_size is None and self.logits.shape[-1] != width:
            raise ValueError(
                f"{name} {tuple(self.logits.shape)} and player_logits {(*targets.shape, width)} differ; "
                f"models padded to different widths need vocab_size"
            )
        _check_vocabulary(vocab_size, self.logits, name, "columns", -1)

    def are_for(self, targets: Tensor, ignore_index: int) -> bool:
        return True

    def flat(self, vocab_size: int) -> LiveAnswers:
        return LiveAnswers(self.logits.reshape(-1, self.logits.shape[-1])[:, :vocab_size])

    def cast(self, dtype: torch.dtype) -> LiveAnswers:
        return LiveAnswers(self.logits.to(dtype))

    def reader(self, rows: int, ignored: Tensor) -> Callable[[slice], LiveAnswers]:
        return lambda chunk: LiveAnswers(self.logits[chunk].masked_fill(ignored[chunk].unsqueeze(1), 0.0))

    @property
    def normaliser(self) -> tuple[Tensor, Tensor]:
        """The largest logit and log Σ exp(logits − largest), (N,) each; computed at the first use."""
        if self._normaliser is None:
            self._normaliser = _normaliser(self.logits, self.logits.amax(dim=1))
        return self._normaliser

    def proposals(self, k: int, top_p: float | None) -> tuple[Tensor, Tensor]:
        """The ``k`` most likely tokens in falling order, and which of them ``top_p`` keeps; both (N, k)."""
        values, tokens = top_k(self.logits, k)
        if top_p is None or top_p == 1:  # a sum that reaches exactly 1 would be an accident of rounding
            return tokens, torch.ones_like(tokens, dtype=torch.bool)
        largest, log_total = (part.unsqueeze(1) for part in _normaliser(self.logits, values[:, 0]))
        return tokens, _prefix((values - largest - log_total).exp(), top_p)

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
        """Draw tokens outside of the valid actions from the critic's distribution, and the mass each stands for.

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

    def dense_tail(self, amount: Tensor) -> DenseTail:
        """The whole distribution, times ``amount`` (N,)."""
        return DenseTail(self.logits, *self.normaliser, amount)

    def add_distribution_(self, soft_targets: Tensor, share: Tensor | float, log_probs: Tensor) -> Tensor:
        """Add ``share`` times the distribution to ``soft_targets`` (N, V); return −KL(critic‖policy) (N,) in nats.

        ``log_probs`` (N, V) are the policy's.
        """
        policy = Policy.of(self.logits)
        probs = policy.log_probs().exp_().to(log_probs.dtype)
        soft_targets += share * probs
        return policy.entropy.to(log_probs.dtype) + torch.linalg.vecdot(probs, log_probs)


class HiddenAnswers(NamedTuple):
    """A live critic, given its last hidden states and its head weight; also those of a player."""

    states: Tensor  # (…, d) floating
    weight: Tensor  # (V, d) floating

    limits = None

    def check(
        self,
        targets: Tensor,
        width: int | None,
        vocab_size: int | None,
        names: tuple[str, str] = ("critic_hidden", "critic_head_weight"),
    ) -> None:
        (hidden, head), (states, weight) = names, self
        if width is not None and vocab_size is None and weight.shape[0] != width:
            raise ValueError(
                f"{head} {tuple(weight.shape)} and head_weight of {width} rows have different vocabularies; models "
                f"padded to different widths need vocab_size"
            )
        for tensor, name in ((states, hidden), (weight, head)):
            _check_floating(tensor, name)
        _check_targets(targets, states, hidden)
        if weight.dim() != 2 or weight.shape[1] != states.shape[-1]:
            raise ValueError(
                f"{head} {tuple(weight.shape)} does not fit {hidden} {tuple(states.shape)}; "
                f"expected (V, {states.shape[-1]})"
            )
        _check_vocabulary(vocab_size, weight, head, "rows", 0)
        if states.dtype != weight.dtype and not torch.is_autocast_enabled(states.device.type):
            raise ValueError(f"{hidden} is {states.dtype} and {head} {weight.dtype}; expected one dtype")

    def are_for(self, targets: Tensor, ignore_index: int) -> bool:
        return True

    def flat(self, vocab_size: int) -> HiddenAnswers:
        return HiddenAnswers(self.states.reshape(-1, self.states.shape[-1]), self.weight[:vocab_size])

    def cast(self, dtype: torch.dtype) -> HiddenAnswers:
        if torch.float64 in (self.states.dtype, self.weight.dtype):
            return self
        return HiddenAnswers(self.states.to(dtype), self.weight.to(dtype))

    def reader(self, rows: int, ignored: Tensor) -> Callable[[slice], LiveAnswers]:
        # Written anew by every chunk: fresh memory would cost as much as computing what goes into it.
        memory = self.states.new_empty(rows, self.weight.shape[0])

        def read(chunk: slice) -> LiveAnswers:
            # Padding may hold NaN, and 0 · NaN is one.
            states = self.states[chunk].masked_fill(ignored[chunk].unsqueeze(1), 0.0)
            return LiveAnswers(torch.mm(states, self.weight.t(), out=memory[: states.shape[0]]))

        return read


class CachedAnswers(NamedTuple):
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
    def limits(self) -> tuple[int, int]:
        return self.num_top, self.num_draws

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

    def check(self, targets: Tensor, width: int | None, vocab_size: int | None) -> None:
        if self.log_rest.shape != targets.shape:
            raise ValueError(f"cached critic {tuple(self.log_rest.shape)} does not fit targets {tuple(targets.shape)}")
        if self.vocab_size != (vocab_size or width):
            raise ValueError(f"cached critic has {self.vocab_size} tokens; expected the player's {vocab_size or width}")

    def are_for(self, targets: Tensor, ignore_index: int) -> bool:
        has_shape = targets.shape == self.log_rest.shape
        return has_shape and bool(((targets == self.tokens[..., 0]) | (targets == ignore_index)).all())

    def flat(self, vocab_size: int) -> CachedAnswers:
        return self._replace(
            tokens=self.tokens.flatten(0, -2),
            log_probs=self.log_probs.flatten(0, -2),
            log_rest=self.log_rest.flatten(),
            draws=self.draws.flatten(0, -2),
            entropy=self.entropy.flatten(),
        )

    def cast(self, dtype: torch.dtype) -> CachedAnswers:
        return self

    def reader(self, rows: int, ignored: Tensor) -> Callable[[slice], CachedAnswers]:
        def read(chunk: slice) -> CachedAnswers:
            rows = CachedAnswers(*(tensor[chunk] for tensor in self[:-1]), self.log_frequencies)
            dropped = ignored[chunk]
            return rows._replace(
                log_probs=rows.log_probs.masked_fill(dropped.unsqueeze(1), 0.0),
                log_rest=rows.log_rest.masked_fill(dropped, 0.0),
                entropy=rows.entropy.masked_fill(dropped, 0.0),
            )

        return read

    def map(self, change: Callable[[Tensor], Tensor]) -> CachedAnswers:
        """The same with each of the tensors changed, as for another device."""
        return CachedAnswers(*(change(tensor) for tensor in self))

    def proposals(self, k: int, top_p: float | None) -> tuple[Tensor, Tensor]:
        """See :meth:`LiveAnswers.proposals`; fewer than ``k`` where fewer are stored."""
        tokens, log_probs = self.tokens[:, 1 : 1 + k], self.log_probs[:, 1 : 1 + k]
        kept = torch.ones_like(tokens, dtype=torch.bool)
        if top_p is not None and top_p < 1:
            kept = _prefix(log_probs.exp(), top_p)
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

    @property
    def _repeats(self) -> Tensor:
        """The place (N, 1 + P) of the target among the most likely, where it would count twice."""
        return torch.nn.functional.pad(self.tokens[:, 1:] == self.tokens[:, :1], (1, 0))

    def log_outside(self, actions: Tensor, valid: Tensor, log_probs: Tensor) -> Tensor:
        """See :meth:`LiveAnswers.log_outside`: the rest and what is stored outside, less what was estimated inside."""
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
        """See :meth:`LiveAnswers.sample_outside`: the stored tokens outside of the actions, then the drawn ones.

        Nothing is drawn here. Places that hold an action have no mass, since that has it already.
        """
        tokens = torch.cat([self.tokens[:, 1:], self.draws], dim=1)  # (N, P + S)
        mass = self.log_probs[:, 1:].exp()
        if self.num_draws:
            each = (self.log_rest.exp() / self.num_draws).unsqueeze(1).expand(-1, self.num_draws)
            mass = torch.cat([mass, each], dim=1)
        inside = ((tokens.unsqueeze(2) == actions.unsqueeze(1)) & valid.unsqueeze(1)).any(dim=2)
        return tokens, mass.masked_fill(inside, 0.0)

    def add_distribution_(self, soft_targets: Tensor, share: Tensor | float, log_probs: Tensor) -> Tensor:
        """See :meth:`LiveAnswers.add_distribution_`; in expectation over the drawn tokens."""
        probs = self.log_probs.exp().masked_fill(self._repeats, 0.0)
        each = (self.log_rest.exp() / max(1, self.num_draws)).unsqueeze(1).expand_as(self.draws)
        tokens = torch.cat([self.tokens, self.draws], dim=1)  # (N, 1 + P + S); of one listed twice the sum counts
        probs = torch.cat([probs, each], dim=1).to(log_probs.dtype)
        soft_targets.scatter_add_(1, tokens, share * probs)
        return self.entropy.to(log_probs.dtype) + torch.linalg.vecdot(probs, log_probs.gather(1, tokens))


# Answers that are tuples of tensors, by how many: a compiled graph carries them as one flat list.
BY_NUMBER_OF_TENSORS = {len(kind._fields): kind for kind in (HiddenAnswers, CachedAnswers)}


def is_one(critics: Tensor | Answers | Sequence[Tensor | Answers] | None) -> bool:
    """Whether these are one critic, and not a list or None."""
    return isinstance(critics, (Tensor, LiveAnswers, HiddenAnswers, CachedAnswers))


def as_answers(
    critics: Tensor | Answers | Sequence[Tensor | Answers] | None, *heads: Tensor | Sequence[Tensor | None] | None
) -> list[Answers]:
    """One critic, several or none, as a list.

    Args:
        critics: Logits, or hidden states where ``heads`` are given; or answers of any kind.
        heads: At most one argument: the critics' head weights, None for answers of their own kind.

    Raises:
        ValueError: There are other numbers of critics and heads.
    """
    several = [critics] if is_one(critics) else list(critics or ())
    if not heads:
        return [LiveAnswers(critic) if isinstance(critic, Tensor) else critic for critic in several]
    weights = [heads[0]] if is_one(heads[0]) else list(heads[0] or ())
    if not weights and not any(isinstance(critic, Tensor) for critic in several):
        weights = [None] * len(several)
    if len(several) != len(weights):
        raise ValueError(f"{len(several)} critic_hidden but {len(weights)} critic_head_weight given")
    pairs = zip(several, weights, strict=True)
    return [HiddenAnswers(critic, weight) if isinstance(critic, Tensor) else critic for critic, weight in pairs]


def _check_floating(tensor: Tensor, name: str) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} has dtype {tensor.dtype}; expected a floating dtype")


def _check_targets(targets: Tensor, scores: Tensor, name: str) -> None:
    """Raise a ValueError unless integer ``targets`` (…) match the leading dimensions of ``scores`` (…, d)."""
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets have dtype {targets.dtype}; expected integer token ids")
    if scores.dim() < 1 or scores.shape[:-1] != targets.shape:
        raise ValueError(
            f"{name} {tuple(scores.shape)} do not fit targets {tuple(targets.shape)}; "
            f"expected {(*targets.shape, scores.shape[-1] if scores.dim() else 'V')}"
        )


def _check_vocabulary(vocab_size: int | None, tensor: Tensor, name: str, of: str, dim: int) -> None:
    found, verb = tensor.shape[dim], "have" if name.endswith("s") else "has"
    if vocab_size is not None and not 1 <= vocab_size <= found:
        raise ValueError(
            f"vocab_size is {vocab_size} but {name} {tuple(tensor.shape)} {verb} {found} {of}; expected 1 to {found}"
        )


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and token ids (N, k) of the largest logits (N, V), in falling order; ties are broken anyhow.

    Equal to ``logits.topk(k)``, in little more than one reading of a row: the k largest lie in the k blocks with the
    largest maxima, so one cheap reduction leaves k blocks to look into. NaN counts as largest, as there.
    """
    vocabulary = logits.shape[1]
    # Near √(k · V) the maxima are about as many as the tokens of k blocks.
    num_blocks = 2 ** math.ceil(math.log2(vocabulary * k) / 2)
    if vocabulary < SMALL_VOCABULARY or 4 * num_blocks > vocabulary:
        return logits.topk(k, dim=1)
    # Block b holds the tokens b, b + B, b + 2·B, …: maxima are then taken over whole vectors. The last tokens, too few
    # for one more layer of blocks, are looked at in any case.
    in_blocks = vocabulary // num_blocks * num_blocks
    maxima = logits[:, :in_blocks].unflatten(1, (-1, num_blocks)).amax(dim=1)
    blocks = maxima.topk(k, dim=1, sorted=False).indices  # (N, k)
    layers = torch.arange(0, in_blocks, num_blocks, device=logits.device)
    candidates = (blocks.unsqueeze(2) + layers).flatten(1)  # (N, k · layers)
    rest = torch.arange(in_blocks, vocabulary, device=logits.device).expand(logits.shape[0], -1)
    candidates = torch.cat([candidates, rest], dim=1)
    values, places = logits.gather(1, candidates).topk(k, dim=1)
    return values, candidates.gather(1, places)


def _prefix(probs: Tensor, top_p: float) -> Tensor:
    """Which of ``probs`` (N, k), in falling order, make the shortest prefix that reaches ``top_p``."""
    before = probs.cumsum(dim=-1) - probs
    # The first token stays whatever the rounding of a sum minus its only term.
    before[:, :1].zero_()
    return ~(before >= top_p)  # a NaN stays too


def _normaliser(logits: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """``largest`` (N,) of logits (N, V) and log Σ exp(logits − largest), in the dtype to compute in."""
    largest = largest.to(compute_dtype(logits.dtype))
    return largest, (logits - largest.unsqueeze(1)).exp_().sum(dim=1).log()
