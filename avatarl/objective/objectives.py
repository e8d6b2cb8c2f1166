"""The objectives: a loss, its gradient in closed form and metrics, row by row.

An objective sees some positions at once as :class:`LossInputs` and returns :class:`LossOutputs`. It never sees a model,
so the same few lines serve logits and hidden states (:mod:`.engine`). What each costs and uses without torch stands in
:data:`.config.OBJECTIVES`.

Each gradient is over the logits z of one position, before its weight. With π the softmax of z, H its entropy, r rewards
and R = Σ r:

    avatarl             L = −Σ r log π − β H                  ∂L/∂z = R·π − r + β·π·(log π + H)
    soft targets t      L = −Σ t log π                        ∂L/∂z = π − t
    expected reward     J = Σ π r                             ∂J/∂z = π (r − J)
    sampled actions     L = −(1/S) Σ_s w_s log π(a_s)         ∂L/∂z = (1/S) Σ_s w_s (π − onehot(a_s))

A policy at z / temperature adds a factor 1 / temperature to the gradient.

Shapes: N positions, V vocabulary, A active actions, S sampled actions.
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

from .answers import CachedAnswers, LiveAnswers
from .config import OBJECTIVES, AvataRLConfig, BaselineConfig, ObjectiveKind
from .policy import Policy, largest_of_tails
from .rewards import Rewards, compute_rewards
from .schedule import Scheduled, Weight

Limits = tuple[int, int] | None  # a cached critic's numbers of most likely and of drawn tokens; None of a live one

_ARTICLE, _BASELINE = AvataRLConfig.article(), BaselineConfig()


class LossInputs(NamedTuple):
    """What an objective is given: N positions, logits over the real vocabulary in any floating dtype."""

    player_logits: Tensor  # (N, V); given away: the gradient may be written over them
    critics: Sequence[LiveAnswers | CachedAnswers]  # C of them
    targets: Tensor  # (N,) int64, a real id everywhere
    weights: Tensor  # (N,) what a position counts in the gradient: in proportion to 1/M, 0 where ignored
    snapshot_logits: Tensor | None = None  # (N, V), the earlier policy that ppo samples from
    uniforms: Tensor | None = None  # (N, S) in [0, 1), for objectives that sample
    scheduled: Scheduled | None = None  # values of settings that change over time
    compiled: bool = False  # whether passes over the logits go through torch.compile


class LossOutputs(NamedTuple):
    """What an objective returns."""

    gradient: Tensor | None  # (N, V) of the weighted loss over player_logits; None when not asked for
    metrics: dict[str, Tensor]  # (N,) each, unweighted; always with "loss", "cross_entropy" and "entropy"


_CLASSES: dict[str, type[Objective]] = {}


class Objective(ABC):
    """A loss over next-token logits. A subclass with a ``name`` has the kind of that entry of ``OBJECTIVES``."""

    name: ClassVar[str]
    kind: ClassVar[ObjectiveKind]
    extra_metrics: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, name: str | None = None):
        if name is not None:
            cls.name, cls.kind, _CLASSES[name] = name, OBJECTIVES[name], cls

    def __init__(self, avatarl: AvataRLConfig | None = None, baseline: BaselineConfig | None = None):
        self.avatarl = avatarl or _ARTICLE
        self.baseline = baseline or _BASELINE
        self.needs_critic = self.kind.needs_critic(self.avatarl, self.baseline)
        self.needs_snapshot = self.kind.needs_snapshot
        self.samples_tail = self.kind.is_rewarded and self.avatarl.tail_rule == "sample"
        # S, how many uniform numbers a position needs; that of a sampled tail is the last one.
        self.num_uniforms = (self.baseline.samples if self.kind.is_sampled else 0) + self.samples_tail

    @property
    def spec(self) -> str:
        """The objective as text: its name and its settings. A compiled graph can carry it as a constant."""
        settings = [
            [_constant(getattr(s, f.name)) for f in dataclasses.fields(s)] for s in (self.avatarl, self.baseline)
        ]
        return repr((self.name, *settings))

    def metric_names(self, limits: Sequence[Limits]) -> tuple[str, ...]:
        """The metrics of :meth:`loss_and_gradient`, in their order, under critics with these limits."""
        names = ("loss", "cross_entropy", "entropy")
        if self.kind.is_rewarded:
            names += ("expected_reward", "expected_reward_share", "other_reward_share", "active_actions")
            names += ("critic_wins",) * bool(limits) + ("estimated_share",) * any(limits)
        return names + self.extra_metrics

    @abstractmethod
    def loss_and_gradient(self, inputs: LossInputs, with_gradient: bool) -> LossOutputs:
        """Loss, metrics and, if asked, the gradient of Σ weights · loss over ``inputs.player_logits``."""

    def check_settings(self, vocabulary: int, limits: Sequence[Limits]) -> None:
        """Refuse settings that do not fit the models.

        Args:
            vocabulary: V.
            limits: One entry for each critic.

        Raises:
            ValueError: A critic is missing, or a setting does not fit the vocabulary or the critics.
        """
        if self.needs_critic and not limits:
            raise ValueError(f"the objective {self.name!r} needs a critic and none is given")

    def check_inputs(self, has_snapshot: bool, uniforms: Tensor | None, positions: int) -> None:
        """Refuse a call that lacks what a sampled objective needs.

        Raises:
            ValueError: The snapshot is missing, or the uniforms are missing or have another shape.
        """
        if self.needs_snapshot and not has_snapshot:
            raise ValueError(f"the objective {self.name!r} needs the snapshot's logits and none are given")
        if self.num_uniforms and (uniforms is None or uniforms.shape != (positions, self.num_uniforms)):
            found = None if uniforms is None else tuple(uniforms.shape)
            raise ValueError(f"uniforms {found} do not fit; {self.name!r} needs {(positions, self.num_uniforms)}")


def _constant(value: Any) -> Any:
    """A setting as the compiler's constant, where it might have made a symbol of a number that changes.

    A set asks for the value of what is put into it, so that the compiler guards it.
    """
    return tuple(map(_constant, value)) if isinstance(value, tuple) else next(iter({value}))


def make_objective(
    name: str, avatarl: AvataRLConfig | None = None, baseline: BaselineConfig | None = None
) -> Objective:
    """Return the objective called ``name``.

    Raises:
        UserError: There is none of that name; the message lists the known ones.
    """
    if name not in _CLASSES:
        known = ", ".join(sorted(OBJECTIVES))
        raise UserError(f"objective is {name!r}; expected one of {known}{nearest_name(name, OBJECTIVES)}")
    return _CLASSES[name](avatarl, baseline)


@functools.cache
def objective_from_spec(spec: str) -> Objective:
    """The objective whose ``spec`` this is."""
    name, avatarl, baseline = ast.literal_eval(spec)
    return make_objective(name, AvataRLConfig(*avatarl), BaselineConfig(*baseline))


# --- rewards of active actions ---------------------------------------------------------------------------------------


class RewardedObjective(Objective):
    """What the objectives that use the reward landscape share."""

    rewards_every_token: ClassVar[bool] = False

    def check_settings(self, vocabulary: int, limits: Sequence[Limits]) -> None:
        super().check_settings(vocabulary, limits)
        config = self.avatarl
        config.critic_weights(len(limits))
        if config.top_k > vocabulary:
            raise ValueError(f"top_k is {config.top_k}; expected at most the vocabulary's {vocabulary} tokens")
        if config.tail_rule == "dense" and not self.rewards_every_token:
            raise ValueError(f"tail='dense' rewards every token, which {self.name!r} does not; expected another tail")
        for num_top, num_draws in filter(None, limits):
            if config.tail_rule == "dense":
                raise ValueError("tail='dense' needs a live critic, and a cached one is given; use tail='sample'")
            if config.tail_rule == "sample" and not num_draws and num_top < vocabulary:
                raise ValueError("tail='sample' needs a cache with drawn tokens (kind sample); found one of kind top")
            if config.tail_rule in ("renormalise", "target") and num_top < config.top_k:
                raise ValueError(
                    f"a cached critic has {num_top} of its most likely tokens at a position; top_k={config.top_k} with "
                    f"tail={config.tail_rule!r} needs as many, a lower top_k or a cache with more bytes_per_token"
                    + (", or tail='sample' with pool='arithmetic' and threshold='none'" if num_draws else "")
                )

    def rewards_and_policies(self, inputs: LossInputs) -> tuple[Rewards, Tensor, Policy, Policy, Weight]:
        """The rewards, the same (N, A) as they enter the loss, the policy for metrics, the one for the loss, and β."""
        temperature, scheduled = self.avatarl.temperature, inputs.scheduled
        uniforms = inputs.uniforms[:, -1:] if self.samples_tail else None
        found = compute_rewards(inputs.player_logits, inputs.critics, inputs.targets, self.avatarl, uniforms, scheduled)
        in_loss = found.rewards
        if self.avatarl.per_action_mean:
            in_loss = in_loss / found.valid.sum(dim=1, keepdim=True)
        policy = tempered = Policy.of(inputs.player_logits, 1.0, inputs.compiled)
        if temperature != 1:
            tempered = Policy.of(inputs.player_logits, temperature, inputs.compiled)
        beta = self.avatarl.entropy_coef if scheduled is None else scheduled.entropy_coef
        return found, in_loss, policy, tempered, beta

    def reward_metrics(self, inputs: LossInputs, found: Rewards, policy: Policy) -> dict[str, Tensor]:
        """What the rewards did at each position (N,); docs/metrics.md says what each number means."""
        actions, valid, rewards = found.actions, found.valid, found.rewards
        total, largest = rewards.sum(dim=1), rewards.amax(dim=1)
        probs = policy.log_probs(actions).exp()
        expected = torch.linalg.vecdot(probs, rewards)
        if found.dense:
            inside = rewards_of_tails(found)
            if len(found.dense) > 1:  # what several critics find likely need be no favourite of any
                largest = torch.maximum(largest, largest_of_tails(found.dense).to(largest.dtype))
            total = total + sum(tail.amount for tail in found.dense) - inside.sum(dim=1)
            expected = expected + policy.tail_sums(found.dense)[1] - torch.linalg.vecdot(probs, inside)
        metrics = {
            **policy.metrics(inputs.targets),
            "expected_reward": expected,
            "expected_reward_share": _share(expected, largest),
            "other_reward_share": _share(total - rewards[:, 0], total),
            "active_actions": valid.sum(dim=1).to(rewards.dtype),
        }
        if inputs.critics:
            wins = 0 * total  # comparisons would make a loss of a NaN
            for column in found.favourites:
                is_favourite = actions[:, column : column + 1] == actions
                earned = torch.where(is_favourite, rewards, 0.0).amax(dim=1)  # duplicates earn 0
                wins = wins + (earned > rewards[:, 0])
            metrics["critic_wins"] = wins / len(inputs.critics)
        if found.estimated is not None:
            metrics["estimated_share"] = found.estimated
        return metrics


def rewards_of_tails(found: Rewards) -> Tensor:
    """The part of the valid actions' rewards (N, A) that dense tails hold already."""
    inside = sum(tail.rewards(found.actions) for tail in found.dense)
    return inside.masked_fill(~found.valid, 0.0).to(found.rewards.dtype)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole (N,), from 0 to 1 whatever the rounding, and 0 where the whole is 0."""
    return torch.where(whole <= 0, 0.0, part / whole.clamp(min=torch.finfo(whole.dtype).tiny)).clamp(0, 1)


class AvataRL(RewardedObjective, name="avatarl"):
    """All active actions at once, each with its reward: −Σ r log π − β H(π)."""

    rewards_every_token = True

    def loss_and_gradient(self, inputs: LossInputs, with_gradient: bool) -> LossOutputs:
        found, rewards, policy, tempered, beta = self.rewards_and_policies(inputs)
        total = rewards.sum(dim=1)
        if found.dense:
            # The tails reward every token; what else the actions earn comes on top.
            rewards = rewards - rewards_of_tails(found)
            total = rewards.sum(dim=1) + sum(tail.amount for tail in found.dense)
        log_likelihood = torch.linalg.vecdot(rewards, tempered.log_probs(found.actions))
        if found.dense:
            log_likelihood = log_likelihood + tempered.tail_sums(found.dense)[0]
        loss = -log_likelihood - beta * tempered.entropy
        metrics = {"loss": loss, **self.reward_metrics(inputs, found, policy)}
        if not with_gradient:
            return LossOutputs(None, metrics)
        weights = inputs.weights / self.avatarl.temperature
        return LossOutputs(tempered.gradient_(weights, total, found.actions, rewards, beta, found.dense), metrics)


class ExpectedReward(RewardedObjective, name="expected_reward"):
    """The exact policy gradient, −Σ π r − β H(π): the article's other formula."""

    def loss_and_gradient(self, inputs: LossInputs, with_gradient: bool) -> LossOutputs:
        found, rewards, policy, tempered, beta = self.rewards_and_policies(inputs)
        probs = tempered.log_probs(found.actions).exp()  # (N, A)
        expected = torch.linalg.vecdot(probs, rewards)
        metrics = {"loss": -expected - beta * tempered.entropy, **self.reward_metrics(inputs, found, policy)}
        if not with_gradient:
            return LossOutputs(None, metrics)
        weights = inputs.weights / self.avatarl.temperature
        return LossOutputs(tempered.gradient_(weights, expected, found.actions, probs * rewards, beta), metrics)


class Reinforce(RewardedObjective, name="reinforce"):
    """S actions drawn from π, leave-one-out baseline: an unbiased estimate of ``expected_reward``'s gradient.

    Reward is 0 outside the active actions. The entropy bonus is exact. With S = 1 there is no baseline.
    """

    extra_metrics = ("sampled_reward",)

    def behaviour(self, inputs: LossInputs, tempered: Policy) -> Policy:
        """The policy that actions are drawn from."""
        return tempered

    def surrogate(self, log_ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Loss (N, S) of the drawn actions, its derivative over log π(a_s) negated (N, S), and metrics (N,).

        ``log_ratio`` is log π(a_s) − log of the probability with which a_s was drawn; here 0 by construction.
        """
        return -advantages, advantages, {}

    def loss_and_gradient(self, inputs: LossInputs, with_gradient: bool) -> LossOutputs:
        found, rewards, policy, tempered, beta = self.rewards_and_policies(inputs)
        behaviour = self.behaviour(inputs, tempered)
        drawn = draw_actions(behaviour.log_probs().exp_(), inputs.uniforms[:, : self.baseline.samples])  # (N, S)
        # Multiplied, and not chosen: of a position with a NaN nothing is known, whatever was drawn.
        drawn_rewards = ((drawn.unsqueeze(2) == found.actions.unsqueeze(1)) * rewards.unsqueeze(1)).sum(dim=2)
        advantages = drawn_rewards - leave_one_out_mean(drawn_rewards)
        log_ratio = tempered.log_probs(drawn) - behaviour.log_probs(drawn)
        loss, credit, extra = self.surrogate(log_ratio, advantages)
        metrics = {
            "loss": loss.mean(dim=1) - beta * tempered.entropy,
            **self.reward_metrics(inputs, found, policy),
            "sampled_reward": drawn_rewards.mean(dim=1),
            **extra,
        }
        if not with_gradient:
            return LossOutputs(None, metrics)
        credit, weights = credit / drawn.shape[1], inputs.weights / self.avatarl.temperature
        return LossOutputs(tempered.gradient_(weights, credit.sum(dim=1), drawn, credit, beta), metrics)


class PPO(Reinforce, name="ppo"):
    """``reinforce`` with actions drawn from a snapshot of the policy and a clipped ratio to it (Schulman et al., 2017).

    An episode is one token long, so generalised advantage estimation reduces to reward minus baseline.
    """

    extra_metrics = ("sampled_reward", "clip_share")

    def behaviour(self, inputs: LossInputs, tempered: Policy) -> Policy:
        return Policy.of(inputs.snapshot_logits, self.avatarl.temperature, inputs.compiled)

    def surrogate(self, log_ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        clip = self.baseline.ppo_clip
        ratio = log_ratio.exp()
        free, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
        stopped = free > clipped  # the minimum is the clipped term, which is constant in π
        share = stopped.to(free).masked_fill(free.isnan(), torch.nan).mean(dim=1)
        return -torch.minimum(free, clipped), free.masked_fill(stopped, 0), {"clip_share": share}


def draw_actions(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Draw tokens (N, S) from ``probs`` (N, V) by inverting the distribution at ``uniforms`` (N, S) in [0, 1)."""
    cumulative = probs.cumsum(dim=1)
    whole = cumulative[:, -1:]
    points = torch.minimum(uniforms.to(probs.dtype) * whole, whole.nextafter(torch.zeros_like(whole))).contiguous()
    return torch.searchsorted(cumulative, points, right=True).clamp(max=probs.shape[1] - 1)


def leave_one_out_mean(rewards: Tensor) -> Tensor:
    """For each of S draws the mean reward (N, S) of the others; 0 when there are none."""
    others = rewards.shape[1] - 1
    return (rewards.sum(dim=1, keepdim=True) - rewards) / others if others else torch.zeros_like(rewards)


# --- soft targets ----------------------------------------------------------------------------------------------------


class CrossEntropy(Objective, name="cross_entropy"):
    """Ordinary pretraining: −log π(target)."""

    def loss_and_gradient(self, inputs: LossInputs, with_gradient: bool) -> LossOutputs:
        policy = Policy.of(inputs.player_logits, 1.0, inputs.compiled)
        metrics = policy.metrics(inputs.targets)
        metrics = {"loss": metrics["cross_entropy"], **metrics}
        if not with_gradient:
            return LossOutputs(None, metrics)
        one = torch.ones_like(inputs.weights)
        gradient = policy.gradient_(inputs.weights, one, inputs.targets.unsqueeze(1), one.unsqueeze(1))
        return LossOutputs(gradient, metrics)


class LabelSmoothing(Objective, name="label_smoothing"):
    """Cross-entropy with a target that gives ε/V to every token of the vocabulary (Szegedy et al., 2016)."""

    def loss_and_gradient(self, inputs: LossInputs, with_gradient: bool) -> LossOutputs:
        smoothing, weights = self.baseline.label_smoothing, inputs.weights
        policy = Policy.of(inputs.player_logits, 1.0, inputs.compiled)
        metrics, log_probs = policy.metrics(inputs.targets), policy.log_probs()
        loss = (1 - smoothing) * metrics["cross_entropy"] - smoothing * log_probs.mean(dim=1)
        metrics = {"loss": loss, **metrics}
        if not with_gradient:
            return LossOutputs(None, metrics)
        gradient = (log_probs.exp_() - smoothing / log_probs.shape[1]) * weights.unsqueeze(1)
        return LossOutputs(_subtract_target(gradient, inputs.targets, (1 - smoothing) * weights), metrics)


class Distillation(Objective, name="distillation"):
    """α·cross-entropy + (1−α)·KL(critic‖player) over the whole vocabulary; several critics are averaged."""

    def check_settings(self, vocabulary: int, limits: Sequence[Limits]) -> None:
        super().check_settings(vocabulary, limits)
        if any(not num_draws and num_top < vocabulary for num_top, num_draws in filter(None, limits)):
            raise ValueError(
                "distillation from a critic's most likely tokens alone would teach another distribution; expected a "
                "cache of kind sample, or a live critic"
            )

    def loss_and_gradient(self, inputs: LossInputs, with_gradient: bool) -> LossOutputs:
        alpha, shares = _distillation_shares(self.baseline, len(inputs.critics), inputs.scheduled)
        policy, weights = Policy.of(inputs.player_logits, 1.0, inputs.compiled), inputs.weights
        metrics, log_probs = policy.metrics(inputs.targets), policy.log_probs()
        loss, soft_targets = alpha * metrics["cross_entropy"], torch.zeros_like(log_probs)
        for critic, share in zip(inputs.critics, shares, strict=True) if self.needs_critic else ():
            loss = loss - share * critic.add_distribution_(soft_targets, share, log_probs)
        metrics = {"loss": loss, **metrics}
        if not with_gradient:
            return LossOutputs(None, metrics)
        gradient = log_probs.exp_().sub_(soft_targets).mul_(weights.unsqueeze(1))
        return LossOutputs(_subtract_target(gradient, inputs.targets, alpha * weights), metrics)


def _distillation_shares(
    config: BaselineConfig, num_critics: int, scheduled: Scheduled | None
) -> tuple[Weight, Sequence[Weight]]:
    """The weight of cross-entropy, and that of each critic's divergence."""
    share = (1 - config.distillation_alpha) / max(1, num_critics)
    if scheduled is None:
        return config.distillation_alpha, [share] * num_critics
    now = [scheduled.critic_factors[i] * share for i in range(num_critics)]
    return 1 - sum(now), now


def _subtract_target(gradient: Tensor, targets: Tensor, amount: Tensor) -> Tensor:
    """Subtract ``amount`` (N,) from the target's column, in place."""
    return gradient.scatter_add_(1, targets.unsqueeze(1), -amount.unsqueeze(1))
