"""The AvataRL loss: a reward-weighted log-likelihood of all active actions, with an entropy bonus.

    L = (1/M) Σ_positions [ − Σ_a r(a) log π(a)  −  β H(π) ]

and, with R = Σ_a r(a), its gradient over the logits z in closed form:

    ∂L/∂z = (1/M) [ R·π − r + β·π·(log π + H) ]

π is the softmax of z / temperature over the whole vocabulary, which adds a factor 1 / temperature to the gradient.
Shapes: N positions, V vocabulary, A active actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .actions import first_proposals
from .config import AvataRLConfig
from .protocol import Objective, Policy, Rows, Scores, objective_loss, register
from .rewards import Judgement, draws_of_tail
from .schedule import entropy_coef
from .stored import StoredCritic


class RewardedObjective(Objective):
    """What the objectives that use the reward landscape share."""

    pays_dense_tail: ClassVar[bool] = False
    settings = ("avatarl.",)

    @property
    def needs_critic(self) -> bool:
        return self.avatarl.needs_critic

    @property
    def samples_tail(self) -> bool:
        return self.avatarl.tail_rule == "sample"

    def check_settings(self, vocabulary: int, num_critics: int, stored: Sequence[tuple[int, int]] = ()) -> None:
        super().check_settings(vocabulary, num_critics, stored)
        config = self.avatarl
        config.critic_weights(num_critics)
        if config.top_k > vocabulary:
            raise ValueError(f"top_k is {config.top_k}; expected at most the vocabulary's {vocabulary} tokens")
        if config.tail_rule == "dense" and not self.pays_dense_tail:
            raise ValueError(f"tail='dense' pays every token, which {self.name!r} does not; expected another tail")
        for num_top, num_draws in stored:
            if config.tail_rule == "dense":
                raise ValueError("tail='dense' needs the critic itself, and a cached one is given; use tail='sample'")
            if config.tail_rule == "sample" and not num_draws and num_top < vocabulary:
                raise ValueError("tail='sample' needs a cache with drawn tokens (kind sample); found one of kind top")
            if config.tail_rule in ("renormalise", "target") and num_top < config.top_k:
                raise ValueError(
                    f"a cached critic has {num_top} of its most likely tokens at a position; top_k={config.top_k} with "
                    f"tail={config.tail_rule!r} needs as many, a lower top_k or a cache with more bytes_per_token"
                    + (", or tail='sample' with pool='arithmetic' and threshold='none'" if num_draws else "")
                )

    def metric_names(self, num_critics: int, num_stored: int = 0) -> tuple[str, ...]:
        return (
            *super().metric_names(num_critics),
            *("expected_reward", "expected_reward_share", "other_reward_share", "active_actions"),
            *(("critic_wins",) if num_critics else ()),
            *(("estimated_share",) if num_stored else ()),
        )

    def judge(self, rows: Rows) -> Judgement:
        """The actions and what they are paid."""
        uniforms = rows.uniforms[:, -1:] if self.samples_tail else None
        return rows.kernels.judge(
            rows.player_logits, rows.critics, rows.targets, self.avatarl, uniforms, rows.scheduled
        )

    def policies(self, rows: Rows) -> tuple[Policy, Policy]:
        """The policy itself, which metrics describe, and the one at the loss's temperature."""
        policy, temperature = Policy.of(rows.player_logits, 1.0, rows.kernels), self.avatarl.temperature
        return policy, policy if temperature == 1 else Policy.of(rows.player_logits, temperature, rows.kernels)

    def loss_rewards(self, judged: Judgement) -> Tensor:
        """The rewards (N, A) as they enter the loss: divided by n where ``per_action_mean`` says so."""
        if self.avatarl.per_action_mean:
            return judged.rewards / judged.valid.sum(dim=1, keepdim=True)
        return judged.rewards

    def reward_metrics(self, rows: Rows, judged: Judgement, policy: Policy) -> dict[str, Tensor]:
        """What the rewards did at each position (N,); docs/metrics.md says what each number means."""
        actions, valid, rewards = judged.actions, judged.valid, judged.rewards
        total, largest = rewards.sum(dim=1), rewards.amax(dim=1)
        probs = policy.log_probs_at(actions).exp()
        expected = torch.linalg.vecdot(probs, rewards)
        if judged.dense:
            inside = tail_inside(judged)
            if len(judged.dense) > 1:  # what several critics find likely need be no favourite of any
                largest = torch.maximum(largest, rows.kernels.largest_of_tails(judged.dense).to(largest.dtype))
            total = total + sum(tail.amount for tail in judged.dense) - inside.sum(dim=1)
            expected = expected + policy.tail_sums(judged.dense)[1] - torch.linalg.vecdot(probs, inside)
        metrics = {
            "expected_reward": expected,
            "expected_reward_share": _share(expected, largest),
            "other_reward_share": _share(total - rewards[:, 0], total),
            "active_actions": valid.sum(dim=1).to(rewards.dtype),
        }
        if rows.critics:
            wins = 0 * total  # comparisons would make a loss of a NaN
            for column in first_proposals(rows.critics, self.avatarl.top_k, self.avatarl.player_proposes):
                is_favourite = actions[:, column : column + 1] == actions
                paid = torch.where(is_favourite, rewards, 0.0).amax(dim=1)  # duplicates earn 0
                wins = wins + (paid > rewards[:, 0])
            metrics["critic_wins"] = wins / len(rows.critics)
        if judged.estimated is not None:
            metrics["estimated_share"] = judged.estimated
        return metrics


def tail_inside(judged: Judgement) -> Tensor:
    """The part of the valid actions' rewards (N, A) that dense tails hold already."""
    inside = sum(tail.at(judged.actions) for tail in judged.dense)
    return inside.masked_fill(~judged.valid, 0.0).to(judged.rewards.dtype)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole (N,), from 0 to 1 whatever the rounding, and 0 where the whole is 0."""
    return torch.where(whole <= 0, 0.0, part / whole.clamp(min=torch.finfo(whole.dtype).tiny)).clamp(0, 1)


@register
class AvataRL(RewardedObjective):
    """All active actions at once, each with its reward: −Σ r log π − β H(π)."""

    name = "avatarl"
    pays_dense_tail = True

    def draws(self, uniforms: Tensor | None, player: Tensor) -> Tensor | None:
        return draws_of_tail(self.avatarl, uniforms, player)

    def score(self, rows: Rows, with_gradient: bool) -> Scores:
        beta, temperature = entropy_coef(self.avatarl, rows.scheduled), self.avatarl.temperature
        judged = self.judge(rows)
        policy, tempered = self.policies(rows)
        paid = self.loss_rewards(judged)
        total = paid.sum(dim=1)
        if judged.dense:
            # The tails pay every token; what else the actions earn comes on top.
            paid = paid - tail_inside(judged)
            total = paid.sum(dim=1) + sum(tail.amount for tail in judged.dense)
        log_likelihood = torch.linalg.vecdot(paid, tempered.log_probs_at(judged.actions))
        if judged.dense:
            log_likelihood = log_likelihood + tempered.tail_sums(judged.dense)[0]
        metrics = {
            "loss": -log_likelihood - beta * tempered.entropy,
            **policy.metrics(rows.targets),
            **self.reward_metrics(rows, judged, policy),
        }
        if not with_gradient:
            return Scores(None, metrics)
        gradient = tempered.gradient_(rows.weights / temperature, total, judged.actions, paid, beta, judged.dense)
        return Scores(gradient, metrics)


def avatarl_loss(
    player_logits: Tensor,
    critic_logits: Tensor | StoredCritic | Sequence[Tensor | StoredCritic] | None,
    targets: Tensor,
    config: AvataRLConfig = AvataRLConfig.article(),
    ignore_index: int = -100,
    vocab_size: int | None = None,
    num_valid: Tensor | float | None = None,
    uniforms: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The AvataRL loss from materialised logits.

    It is this, without the intermediate tensors and with the gradient in closed form::

        landscape = reward_landscape(player_logits, critic_logits, targets, config)
        log_pi = player_logits.log_softmax(-1)
        entropy = -(log_pi.exp() * log_pi).sum(-1)
        loss = (-(landscape.rewards * log_pi.gather(1, landscape.actions)).sum(1) - 0.01 * entropy).mean()

    Args:
        player_logits: (…, V) floating, requires grad. Half precision is computed in float32, float64 in float64.
        critic_logits: (…, V) floating, or what a cache holds of the critic; a list for several critics; None when
            ``config.critic_weight`` is 0.
        targets: (…) integer token ids.
        config: The settings.
        ignore_index: Positions with this target count nothing, whatever stands there.
        vocab_size: Ids from here on are padding of the embedding: never active, outside every softmax.
        num_valid: M, what the sum over positions is divided by, a number or tensor () of any dtype; the positions not
            ignored when None. Pass the count of the whole optimiser step under gradient accumulation: losses and
            metrics of its parts then add up. With M = 0 loss and gradient are 0.
        uniforms: (N, 1) in [0, 1), the draws of ``tail="sample"``; torch's own when None.

    Returns:
        loss: scalar, in float32 or float64; NaN where what a model says of a counted position has no softmax.
        metrics: scalar tensors on the device, detached, divided by M as the loss is (docs/metrics.md).

    Raises:
        ValueError: Shapes or dtypes do not fit, or ``top_k`` is larger than the vocabulary.

    Source: tokenbender, "avatarl: training language models from scratch with pure reinforcement learning", 2025.
    """
    return objective_loss(
        AvataRL(config),
        player_logits,
        critic_logits,
        targets,
        ignore_index=ignore_index,
        vocab_size=vocab_size,
        num_valid=num_valid,
        uniforms=uniforms,
    )
