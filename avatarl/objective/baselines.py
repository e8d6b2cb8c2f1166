"""The other objectives: likelihoods of soft targets, and policy gradients on the same reward landscape.

Each gradient is over the logits z of one position, before its weight. With π the softmax of z:

    soft targets t      L = −Σ t log π                        ∂L/∂z = π − t
    expected reward     J = Σ π r                             ∂J/∂z = π (r − J)
    sampled actions     L = −(1/S) Σ_s w_s log π(a_s)         ∂L/∂z = (1/S) Σ_s w_s (π − onehot(a_s))

Shapes: N positions, V vocabulary, A active actions, S sampled actions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .losses import RewardedObjective
from .protocol import OBJECTIVES as OBJECTIVES
from .protocol import Objective, Policy, Rows, Scores, register
from .protocol import make_objective as make_objective
from .schedule import distillation_shares, entropy_coef
from .stored import StoredCritic


@register
class CrossEntropy(Objective):
    """Ordinary pretraining: −log π(target)."""

    name = "cross_entropy"

    def score(self, rows: Rows, with_gradient: bool) -> Scores:
        policy = Policy.of(rows.player_logits, 1.0, rows.kernels)
        metrics = policy.metrics(rows.targets)
        metrics = {"loss": metrics["cross_entropy"], **metrics}
        if not with_gradient:
            return Scores(None, metrics)
        one = torch.ones_like(rows.weights)
        return Scores(policy.gradient_(rows.weights, one, rows.targets.unsqueeze(1), one.unsqueeze(1)), metrics)


@register
class LabelSmoothing(Objective):
    """Cross-entropy with a target that gives ε/V to every token of the vocabulary (Szegedy et al., 2016)."""

    name = "label_smoothing"
    settings = ("baseline.label_smoothing",)

    def score(self, rows: Rows, with_gradient: bool) -> Scores:
        smoothing = self.baseline.label_smoothing
        policy, weights = Policy.of(rows.player_logits, 1.0, rows.kernels), rows.weights
        metrics = policy.metrics(rows.targets)
        log_probs = policy.log_probs()
        loss = (1 - smoothing) * metrics["cross_entropy"] - smoothing * log_probs.mean(dim=1)
        metrics = {"loss": loss, **metrics}
        if not with_gradient:
            return Scores(None, metrics)
        gradient = (log_probs.exp_() - smoothing / log_probs.shape[1]) * weights.unsqueeze(1)
        return Scores(_subtract_target(gradient, rows.targets, (1 - smoothing) * weights), metrics)


@register
class Distillation(Objective):
    """α·cross-entropy + (1−α)·KL(critic‖player) over the whole vocabulary; several critics are averaged."""

    name = "distillation"
    settings = ("baseline.distillation_alpha",)

    @property
    def needs_critic(self) -> bool:
        return self.baseline.distillation_alpha < 1

    def check_settings(self, vocabulary: int, num_critics: int, stored: Sequence[tuple[int, int]] = ()) -> None:
        super().check_settings(vocabulary, num_critics, stored)
        if any(not num_draws and num_top < vocabulary for num_top, num_draws in stored):
            raise ValueError(
                "distillation from a critic's most likely tokens alone would teach another distribution; expected a "
                "cache of kind sample, or the critic itself"
            )

    def score(self, rows: Rows, with_gradient: bool) -> Scores:
        alpha, shares = distillation_shares(self.baseline, len(rows.critics), rows.scheduled)
        policy, weights = Policy.of(rows.player_logits, 1.0, rows.kernels), rows.weights
        metrics = policy.metrics(rows.targets)
        log_probs = policy.log_probs()
        loss, soft_targets = alpha * metrics["cross_entropy"], torch.zeros_like(log_probs)
        for critic, share in zip(rows.critics, shares, strict=True) if self.needs_critic else ():
            if isinstance(critic, StoredCritic):
                tokens, probs = critic.estimate()  # (N, 1 + P + S)
                probs = probs.to(log_probs.dtype)
                agreement = torch.linalg.vecdot(probs, log_probs.gather(1, tokens))
                soft_targets.scatter_add_(1, tokens, share * probs)
                entropy = critic.entropy
            else:
                judge = Policy.of(critic, 1.0, rows.kernels)
                probs = judge.log_probs().exp_().to(log_probs.dtype)  # (N, V)
                agreement = torch.linalg.vecdot(probs, log_probs)
                soft_targets += share * probs
                entropy = judge.entropy
            loss = loss - share * (entropy.to(loss.dtype) + agreement)
        metrics = {"loss": loss, **metrics}
        if not with_gradient:
            return Scores(None, metrics)
        gradient = log_probs.exp_().sub_(soft_targets).mul_(weights.unsqueeze(1))
        return Scores(_subtract_target(gradient, rows.targets, alpha * weights), metrics)


def _subtract_target(gradient: Tensor, targets: Tensor, amount: Tensor) -> Tensor:
    """Take ``amount`` (N,) from the target's column, in place."""
    return gradient.scatter_add_(1, targets.unsqueeze(1), -amount.unsqueeze(1))


@register
class ExpectedReward(RewardedObjective):
    """The exact policy gradient, −Σ π r − β H(π): the article's other formula."""

    name = "expected_reward"

    def score(self, rows: Rows, with_gradient: bool) -> Scores:
        beta, temperature = entropy_coef(self.avatarl, rows.scheduled), self.avatarl.temperature
        judged = self.judge(rows)
        policy, tempered = self.policies(rows)
        paid = self.loss_rewards(judged)
        probs = tempered.log_probs_at(judged.actions).exp()  # (N, A)
        expected = torch.linalg.vecdot(probs, paid)
        metrics = {
            "loss": -expected - beta * tempered.entropy,
            **policy.metrics(rows.targets),
            **self.reward_metrics(rows, judged, policy),
        }
        if not with_gradient:
            return Scores(None, metrics)
        gradient = tempered.gradient_(rows.weights / temperature, expected, judged.actions, probs * paid, beta)
        return Scores(gradient, metrics)


@register
class Reinforce(RewardedObjective):
    """S actions drawn from π, leave-one-out baseline: an unbiased estimate of ``expected_reward``'s gradient.

    Reward is 0 outside the active actions. The entropy bonus is exact. With S = 1 there is no baseline.
    """

    name = "reinforce"
    settings = ("avatarl.", "baseline.samples")
    is_sampled = True

    def metric_names(self, num_critics: int, num_stored: int = 0) -> tuple[str, ...]:
        return (*super().metric_names(num_critics, num_stored), "sampled_reward")

    def behaviour(self, rows: Rows, tempered: Policy) -> Policy:
        """The policy that actions are drawn from."""
        return tempered

    def surrogate(self, log_ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Loss (N, S) of the drawn actions, its derivative over log π(a_s) negated (N, S), and metrics (N,).

        ``log_ratio`` is log π(a_s) − log of the probability with which a_s was drawn; here 0 by construction.
        """
        return -advantages, advantages, {}

    def score(self, rows: Rows, with_gradient: bool) -> Scores:
        beta, temperature = entropy_coef(self.avatarl, rows.scheduled), self.avatarl.temperature
        judged = self.judge(rows)
        policy, tempered = self.policies(rows)
        behaviour = self.behaviour(rows, tempered)
        drawn = draw_actions(behaviour.log_probs().exp_(), rows.uniforms[:, : self.baseline.samples])  # (N, S)
        drawn_rewards = look_up_rewards(drawn, judged.actions, self.loss_rewards(judged))
        advantages = drawn_rewards - leave_one_out_mean(drawn_rewards)
        log_ratio = tempered.log_probs_at(drawn) - behaviour.log_probs_at(drawn)
        loss, credit, extra = self.surrogate(log_ratio, advantages)
        metrics = {
            "loss": loss.mean(dim=1) - beta * tempered.entropy,
            **policy.metrics(rows.targets),
            **self.reward_metrics(rows, judged, policy),
            "sampled_reward": drawn_rewards.mean(dim=1),
            **extra,
        }
        if not with_gradient:
            return Scores(None, metrics)
        credit = credit / drawn.shape[1]
        gradient = tempered.gradient_(rows.weights / temperature, credit.sum(dim=1), drawn, credit, beta)
        return Scores(gradient, metrics)


@register
class PPO(Reinforce):
    """``reinforce`` with actions drawn from a snapshot of the policy and a clipped ratio to it (Schulman et al., 2017).

    An episode is one token long, so generalised advantage estimation reduces to reward minus baseline.
    """

    name = "ppo"
    settings = ("avatarl.", "baseline.samples", "baseline.ppo_clip", "baseline.ppo_refresh_every")
    needs_snapshot = True

    def metric_names(self, num_critics: int, num_stored: int = 0) -> tuple[str, ...]:
        return (*super().metric_names(num_critics, num_stored), "clip_share")

    def behaviour(self, rows: Rows, tempered: Policy) -> Policy:
        return Policy.of(rows.snapshot_logits, self.avatarl.temperature, rows.kernels)

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


def look_up_rewards(drawn: Tensor, actions: Tensor, rewards: Tensor) -> Tensor:
    """Rewards (N, S) of drawn tokens: 0 outside the active actions; masked duplicates hold 0 already."""
    # Multiplied, and not chosen: of a position with a NaN nothing is known, whatever was drawn.
    return ((drawn.unsqueeze(2) == actions.unsqueeze(1)) * rewards.unsqueeze(1)).sum(dim=2)


def leave_one_out_mean(rewards: Tensor) -> Tensor:
    """For each of S draws the mean reward (N, S) of the others; 0 when there are none."""
    others = rewards.shape[1] - 1
    return (rewards.sum(dim=1, keepdim=True) - rewards) / others if others else torch.zeros_like(rewards)
