"""What every objective is: a loss and its gradient in closed form, row by row, plus metrics.

An objective sees some positions at once as :class:`Rows` and answers with :class:`Scores`. It never sees a model, so
the same few lines serve materialised logits (:func:`objective_loss`) and the chunked path from hidden states
(:mod:`avatarl.objective.fused`).

Shapes: N positions, V vocabulary, S sampled actions.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from avatarl.errors import UserError, nearest_name

from .actions import sums_of_each
from .checks import as_critics, check_logits, compute_dtype
from .config import AvataRLConfig, BaselineConfig
from .kernels import LOWEST_LOG_PROB, PLAIN, Kernels, shifted
from .rewards import DenseTail
from .schedule import Scheduled, Weight
from .stored import StoredCritic

_ARTICLE, _BASELINE = AvataRLConfig.article(), BaselineConfig()


class Rows(NamedTuple):
    """What an objective is given: N positions, logits over the real vocabulary in any floating dtype."""

    player_logits: Tensor  # (N, V); given away: the gradient may be written over them
    critics: Sequence[Tensor | StoredCritic]  # C of them, logits (N, V) or what is stored
    targets: Tensor  # (N,) int64, a real id everywhere
    weights: Tensor  # (N,) what a position counts in the gradient: in proportion to 1/M, 0 where ignored
    snapshot_logits: Tensor | None = None  # (N, V), the earlier policy that ppo samples from
    uniforms: Tensor | None = None  # (N, S) in [0, 1), the draws of sampled objectives
    kernels: Kernels = PLAIN
    scheduled: Scheduled | None = None  # values of settings that change over time


class Scores(NamedTuple):
    """What an objective answers."""

    gradient: Tensor | None  # (N, V) of the weighted loss over player_logits; None when not asked for
    metrics: dict[str, Tensor]  # (N,) each, unweighted; always with "loss", "cross_entropy" and "entropy"


class Objective(ABC):
    """A loss over next-token logits. Subclasses name themselves and are found by that name."""

    name: ClassVar[str]
    needs_snapshot: ClassVar[bool] = False
    is_sampled: ClassVar[bool] = False
    settings: ClassVar[tuple[str, ...]] = ()  # that it depends on, or whole groups of them, by their names in a recipe

    def __init__(self, avatarl: AvataRLConfig | None = None, baseline: BaselineConfig | None = None):
        self.avatarl = avatarl or _ARTICLE
        self.baseline = baseline or _BASELINE

    @property
    def spec(self) -> tuple[str, str, str]:
        """The objective as text: its name and its settings. A compiled graph can carry it as constants."""
        return self.name, _as_text(self.avatarl), _as_text(self.baseline)

    @property
    def needs_critic(self) -> bool:
        """Whether the loss depends on a critic under these settings."""
        return False

    @property
    def num_draws(self) -> int:
        """S, how many uniform draws a position needs; that of a sampled tail is the last one."""
        return (self.baseline.samples if self.is_sampled else 0) + self.samples_tail

    @property
    def samples_tail(self) -> bool:
        """Whether the critic's tail is sampled."""
        return False

    def metric_names(self, num_critics: int, num_stored: int = 0) -> tuple[str, ...]:
        """The keys of the metrics that :meth:`score` answers with, in their order."""
        return ("loss", "cross_entropy", "entropy")

    @abstractmethod
    def score(self, rows: Rows, with_gradient: bool) -> Scores:
        """Loss, metrics and, if asked, the gradient of Σ weights · loss over ``rows.player_logits``."""

    def check_settings(self, vocabulary: int, num_critics: int, stored: Sequence[tuple[int, int]] = ()) -> None:
        """Refuse settings that do not fit the models.

        Args:
            vocabulary: V.
            num_critics: C.
            stored: Of the cached ones among them, how many most likely and how many drawn tokens they have.

        Raises:
            ValueError: A critic is missing, or a setting does not fit the vocabulary or the critics.
        """
        if self.needs_critic and num_critics == 0:
            raise ValueError(f"the objective {self.name!r} needs a critic and none is given")

    def draws(self, uniforms: Tensor | None, player: Tensor) -> Tensor | None:
        """The uniform draws to use where the caller may have given none, for a player's logits or states (N, …)."""
        return uniforms

    def check_inputs(self, has_snapshot: bool, uniforms: Tensor | None, positions: int) -> None:
        """Refuse a call that lacks what a sampled objective needs.

        Raises:
            ValueError: The snapshot is missing, or the draws are or have another shape.
        """
        if self.needs_snapshot and not has_snapshot:
            raise ValueError(f"the objective {self.name!r} needs the snapshot's logits and none are given")
        if self.num_draws and (uniforms is None or uniforms.shape != (positions, self.num_draws)):
            found = None if uniforms is None else tuple(uniforms.shape)
            raise ValueError(f"uniforms {found} do not fit; {self.name!r} needs {(positions, self.num_draws)}")


def _as_text(settings: AvataRLConfig | BaselineConfig) -> str:
    return repr([_constant(getattr(settings, field.name)) for field in dataclasses.fields(settings)])


def _constant(value: Any) -> Any:
    """A setting as the compiler's constant, where it might have made a symbol of a number that changes.

    A set asks for the value of what is put into it, so that the compiler guards it.
    """
    return tuple(map(_constant, value)) if isinstance(value, tuple) else next(iter({value}))


OBJECTIVES: dict[str, type[Objective]] = {}


def register(objective: type[Objective]) -> type[Objective]:
    """Class decorator: make an objective known by its name."""
    OBJECTIVES[objective.name] = objective
    return objective


def make_objective(
    name: str, avatarl: AvataRLConfig | None = None, baseline: BaselineConfig | None = None
) -> Objective:
    """Return the objective called ``name``.

    Raises:
        UserError: There is none of that name; the message lists the known ones.
    """
    if name not in OBJECTIVES:
        known = ", ".join(sorted(OBJECTIVES))
        raise UserError(f"objective is {name!r}; expected one of {known}{nearest_name(name, OBJECTIVES)}")
    return OBJECTIVES[name](avatarl, baseline)


@functools.cache
def objective_from_spec(name: str, avatarl: str, baseline: str) -> Objective:
    """The objective whose ``spec`` this is."""
    return make_objective(name, AvataRLConfig(*ast.literal_eval(avatarl)), BaselineConfig(*ast.literal_eval(baseline)))


class Policy(NamedTuple):
    """π, the softmax of logits / temperature at N positions; nothing of size (N, V) is kept beside the logits."""

    logits: Tensor  # (N, V)
    temperature: float
    largest: Tensor  # (N,), of the logits
    log_total: Tensor  # (N,), log Σ exp((logits − largest) / temperature)
    entropy: Tensor  # (N,) nats
    kernels: Kernels

    @classmethod
    def of(cls, logits: Tensor, temperature: float = 1.0, kernels: Kernels = PLAIN) -> Policy:
        """The softmax of ``logits / temperature``."""
        return cls(logits, temperature, *kernels.statistics(logits, temperature), kernels)

    def log_probs_at(self, tokens: Tensor) -> Tensor:
        """log π of tokens (N, S); finite, so that 0 · log 0 = 0."""
        return self._log_probs(self.logits.gather(1, tokens))

    def log_probs(self) -> Tensor:
        """log π of every token (N, V), finite."""
        return self._log_probs(self.logits)

    def _log_probs(self, logits: Tensor) -> Tensor:
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
        arguments = (self.logits, self.temperature, self.largest, constant, slope, tails)
        if self.logits.dtype == amounts.dtype:
            return self.kernels.gradient_(*arguments).scatter_add_(1, tokens, -amounts)
        # In half precision the difference must be taken before it is rounded: where π is near 1 it is all that is left.
        tokens, _, taken = sums_of_each(tokens, amounts)
        below = shifted(self.logits.gather(1, tokens), self.largest, self.temperature).clamp_(min=LOWEST_LOG_PROB)
        slopes = constant.unsqueeze(1) + (0 if slope is None else slope.unsqueeze(1) * below)
        taken = taken + sum(tail.at(tokens) for tail in tails)
        differences = (below.exp() * slopes - taken).to(self.logits.dtype)
        return self.kernels.gradient_(*arguments).scatter_(1, tokens, differences)

    def tail_sums(self, tails: Sequence[DenseTail]) -> tuple[Tensor, Tensor]:
        """Σ r log π and Σ r π of what ``tails`` hold of the whole vocabulary, (N,) each; 0 without any."""
        nothing = torch.zeros_like(self.entropy)
        arguments = (self.logits, self.temperature, self.largest, self.log_total)
        sums = [self.kernels.tail_sums(*arguments, tail) for tail in tails]
        return sum((first for first, _ in sums), nothing), sum((second for _, second in sums), nothing)

    def metrics(self, targets: Tensor) -> dict[str, Tensor]:
        """Cross-entropy and entropy (N,) in nats."""
        return {"cross_entropy": -self.log_probs_at(targets.unsqueeze(1)).squeeze(1), "entropy": self.entropy}


def position_weights(
    targets: Tensor, ignore_index: int, num_valid: Tensor | float | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Each position's share of the loss, and targets made safe to look up.

    Args:
        targets: (N,) int64.
        ignore_index: Positions with this target count nothing.
        num_valid: M, the positions counted over a whole optimiser step; those of ``targets`` when None.
        dtype: Of the weights.

    Returns:
        weights: (N,) 1/M where counted and 0 elsewhere; all 0 when M is 0.
        targets: (N,) int64 with ignored ones replaced by 0.
    """
    counted = targets != ignore_index
    if num_valid is None:
        total = counted.sum().to(dtype)
    elif isinstance(num_valid, Tensor):
        total = num_valid.to(dtype)
    else:  # filled there: a copy would make the host wait
        total = torch.full((), num_valid, dtype=dtype, device=targets.device)
    return torch.where(counted & ~(total <= 0), 1 / total, 0.0), targets.masked_fill(~counted, 0)


def kinds_of_stored(critics: Sequence) -> list[tuple[int, int]]:
    """Of the cached critics among ``critics``, how many most likely and how many drawn tokens they have."""
    return [(critic.num_top, critic.num_draws) for critic in critics if isinstance(critic, StoredCritic)]


def weighted_sums(metrics: dict[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
    """Σ weights · metric for each metric (N,), as scalars; what an ignored position holds does not matter."""
    counted = weights != 0
    return {name: torch.where(counted, values * weights, 0).sum() for name, values in metrics.items()}


def objective_loss(
    objective: Objective,
    player_logits: Tensor,
    critic_logits: Tensor | StoredCritic | Sequence[Tensor | StoredCritic] | None,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    num_valid: Tensor | float | None = None,
    snapshot_logits: Tensor | None = None,
    uniforms: Tensor | None = None,
    scheduled: Scheduled | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Any objective's loss over materialised logits; :func:`avatarl.avatarl_loss` describes the arguments.

    ``snapshot_logits`` (…, V) and ``uniforms`` (N, S) are for the objectives that sample, ``scheduled`` for settings
    that change over time.
    """
    player, others, targets = check_logits(
        player_logits, [*as_critics(critic_logits), *as_critics(snapshot_logits)], targets, vocab_size
    )
    critics, snapshot = (others[:-1], others[-1]) if snapshot_logits is not None else (others, None)
    objective.check_settings(player.shape[-1], len(critics), kinds_of_stored(critics))
    uniforms = objective.draws(uniforms, player)
    objective.check_inputs(snapshot is not None, uniforms, targets.numel())
    dtype = compute_dtype(player.dtype)
    weights, safe_targets = position_weights(targets, ignore_index, num_valid, dtype)
    wants_gradient = player.requires_grad and torch.is_grad_enabled()
    with torch.no_grad(), torch.autocast(player.device.type, enabled=False):  # autocast would take vecdot in half
        rows = Rows(
            player.to(dtype, copy=wants_gradient),  # the caller's logits stay as they are
            [critic.to(dtype) if isinstance(critic, Tensor) else critic for critic in critics],
            safe_targets,
            weights,
            None if snapshot is None else snapshot.to(dtype),
            uniforms,
            scheduled=scheduled,
        )
        scores = objective.score(rows, wants_gradient)
        if wants_gradient:  # 0 · NaN, where padding holds what is no number
            scores.gradient.masked_fill_((weights == 0).unsqueeze(1), 0.0)
        metrics = weighted_sums(scores.metrics, weights)
    return attach_gradients(metrics["loss"], (player,), (scores.gradient,)), metrics


def attach_gradients(loss: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
    """Return ``loss`` as if autograd had computed it from ``inputs``, with these gradients.

    They are constants to autograd: a second derivative (``create_graph=True``) is not supported.
    """
    pairs = [(x, gradient) for x, gradient in zip(inputs, gradients, strict=True) if gradient is not None]
    if not pairs:
        return loss
    return _KnownGradients.apply(loss, *(x for x, _ in pairs), *(gradient for _, gradient in pairs))


class _KnownGradients(torch.autograd.Function):
    """Hands autograd gradients that were written down in closed form, times the incoming one."""

    @staticmethod
    def forward(ctx, loss: Tensor, *inputs_and_gradients: Tensor) -> Tensor:
        half = len(inputs_and_gradients) // 2
        ctx.save_for_backward(*inputs_and_gradients[half:])
        ctx.dtypes = [x.dtype for x in inputs_and_gradients[:half]]
        return loss.clone()

    @staticmethod
    def backward(ctx, incoming: Tensor):
        gradients = ctx.saved_tensors
        # Multiplied in the loss's dtype, since a gradient scaler's factor may be beyond float16, and rounded once.
        if torch.is_grad_enabled():  # create_graph: over the incoming gradient alone
            scaled = ((gradient * incoming).to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True))
        else:
            scaled = (
                torch.mul(gradient, incoming, out=torch.empty_like(gradient, dtype=dtype))
                for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
            )
        return None, *scaled, *(None for _ in gradients)
