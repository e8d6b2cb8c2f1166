"""The AvataRL loss: a reward-weighted log-likelihood of all active actions, with an entropy bonus.

    L = (1/M) Σ_positions [ − Σ_a r(a) log π(a)  −  β H(π) ]

and, with R = Σ_a r(a), its gradient over the logits z in closed form:

    ∂L/∂z = (1/M) [ R·π − r + β·π·(log π + H) ]

π is the softmax of z / temperature over the whole vocabulary, which adds a factor 1 / temperature to the gradient.
Shapes: N positions, V vocabulary, A active actions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .config import AvataRLConfig
from .protocol import Objective, Policy, Rows, Scores, objective_loss, register


class RewardedObjective(Objective):
    """What the objectives that use the reward landscape share."""

    @property
    def needs_critic(self) -> bool:
        return self.avatarl.needs_critic

    def check_settings(self, vocabulary: int, num_critics: int) -> None:
        super().check_settings(vocabulary, num_critics)
        self.avatarl.critic_weights(num_critics)
        if self.avatarl.top_k > vocabulary:
            raise ValueError(f"top_k is {self.avatarl.top_k}; expected at most the vocabulary's {vocabulary} tokens")

    def metric_names(self, num_critics: int) -> tuple[str, ...]:
        rewards = ("expected_reward", "expected_reward_share", "other_reward_share", "active_actions")
        return (*super().metric_names(num_critics), *rewards, *(("critic_wins",) if num_critics else ()))

    def judge(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Actions, valid and rewards, (N, A) each."""
        return rows.kernels.judge(rows.player_logits, rows.critic_logits, rows.targets, self.avatarl)

    def policies(self, rows: Rows) -> tuple[Policy, Policy]:
        """The policy itself, which metrics describe, and the one at the loss's temperature."""
        policy, temperature = Policy.of(rows.player_logits, 1.0, rows.kernels), self.avatarl.temperature
        return policy, policy if temperature == 1 else Policy.of(rows.player_logits, temperature, rows.kernels)

    def loss_rewards(self, valid: Tensor, rewards: Tensor) -> Tensor:
        """The rewards (N, A) as they enter the loss: divided by n where ``per_action_mean`` says so."""
        return rewards / valid.sum(dim=1, keepdim=True) if self.avatarl.per_action_mean else rewards


def reward_metrics(rows: Rows, actions: Tensor, valid: Tensor, rewards: Tensor, policy: Policy) -> dict[str, Tensor]:
    """What the rewards did at each position (N,); docs/metrics.md says what each number means."""
    total, largest = rewards.sum(dim=1), rewards.amax(dim=1)
    expected = torch.linalg.vecdot(policy.log_probs_at(actions).exp(), rewards)
    metrics = {
        "expected_reward": expected,
        "expected_reward_share": _share(expected, largest),
        "other_reward_share": _share(total - rewards[:, 0], total),
        "active_actions": valid.sum(dim=1).to(rewards.dtype),
    }
    if rows.critic_logits:
        top_k = (actions.shape[1] - 1) // (1 + len(rows.critic_logits))
        favourites = actions[:, 1 + top_k :: top_k].t()  # (C, N), the first of each critic's list
        paid = torch.where(favourites.unsqueeze(2) == actions, rewards, 0.0).amax(dim=2)  # (C, N); duplicates earn 0
        metrics["critic_wins"] = (paid > rewards[:, 0]).to(rewards.dtype).mean(dim=0)
    return metrics


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole (N,), and 0 where the whole is 0."""
    return torch.where(whole > 0, part / whole.clamp(min=torch.finfo(whole.dtype).tiny), 0.0)


@register
class AvataRL(RewardedObjective):
    """All active actions at once, each with its reward: −Σ r log π − β H(π)."""

    name = "avatarl"

    def score(self, rows: Rows, with_gradient: bool) -> Scores:
        beta, temperature = self.avatarl.entropy_coef, self.avatarl.temperature
        actions, valid, rewards = self.judge(rows)
        policy, tempered = self.policies(rows)
        paid = self.loss_rewards(valid, rewards)
        log_likelihood = torch.linalg.vecdot(paid, tempered.log_probs_at(actions))
        metrics = {
            "loss": -log_likelihood - beta * tempered.entropy,
            **policy.metrics(rows.targets),
            **reward_metrics(rows, actions, valid, rewards, policy),
        }
        if not with_gradient:
            return Scores(None, metrics)
        gradient = tempered.gradient_(rows.weights / temperature, paid.sum(dim=1), actions, paid, beta)
        return Scores(gradient, metrics)


def avatarl_loss(
    player_logits: Tensor,
    critic_logits: Tensor | Sequence[Tensor] | None,
    targets: Tensor,
    config: AvataRLConfig = AvataRLConfig.article(),
    ignore_index: int = -100,
    vocab_size: int | None = None,
    num_valid: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The AvataRL loss from materialised logits.

    It is this, without the intermediate tensors and with the gradient in closed form::

        landscape = reward_landscape(player_logits, critic_logits, targets, config)
        log_pi = player_logits.log_softmax(-1)
        entropy = -(log_pi.exp() * log_pi).sum(-1)
        loss = (-(landscape.rewards * log_pi.gather(1, landscape.actions)).sum(1) - 0.01 * entropy).mean()

    Args:
        player_logits: (…, V) floating, requires grad. Half precision is computed in float32, float64 in float64.
        critic_logits: (…, V) floating; a list for several critics; None when ``config.critic_weight`` is 0.
        targets: (…) integer token ids.
        config: The settings.
        ignore_index: Positions with this target count nothing.
        vocab_size: Ids from here on are padding of the embedding: never active, outside every softmax.
        num_valid: M, what the sum over positions is divided by; the positions not ignored when None. Pass the count of
            the whole optimiser step under gradient accumulation: losses and metrics of its parts then add up.

    Returns:
        loss: scalar, in float32 or float64.
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
    )
