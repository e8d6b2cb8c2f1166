"""From active actions to rewards: the experts, their consensus, the threshold and the cap (docs/method.md).

Shapes: N positions, V vocabulary, A columns of active actions, C critics. Everything stays in logs until the consensus.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .actions import active_actions
from .checks import check_logits, compute_dtype
from .config import AvataRLConfig


class RewardLandscape(NamedTuple):
    """What every active action of every position is paid, and why. Zero where ``valid`` is False."""

    actions: Tensor  # (N, A) int64; column 0 is the target
    valid: Tensor  # (N, A) bool
    reality: Tensor  # (N, A) p_R, sums to 1
    critic: Tensor | None  # (N, A) p_C over the whole vocabulary; (C, N, A) for a list of critics; None without one
    consensus: Tensor  # (N, A) p, sums to 1
    rewards: Tensor  # (N, A) r ≥ 0


def reward_landscape(
    player_logits: Tensor,
    critic_logits: Tensor | Sequence[Tensor] | None,
    targets: Tensor,
    config: AvataRLConfig = AvataRLConfig.article(),
    vocab_size: int | None = None,
) -> RewardLandscape:
    """Judge every position: active actions, experts, consensus and rewards.

    Args:
        player_logits: (…, V) floating; leading dimensions are flattened to N.
        critic_logits: (…, V) floating, a list of such for several critics, or None when ``critic_weight`` is 0.
        targets: (…) integer token ids in [0, V).
        config: The settings.
        vocab_size: Ids from here on are padding of the embedding: never active, outside both softmaxes.

    Returns:
        RewardLandscape in float32, or float64 for float64 player logits. No gradient flows through it.

    Raises:
        ValueError: Shapes or dtypes do not fit; ``top_k`` is larger than the vocabulary.
    """
    player, critics, targets = check_logits(player_logits, critic_logits, targets, vocab_size)
    dtype = compute_dtype(player.dtype)
    with torch.no_grad():
        player, critics = player.to(dtype), [critic.to(dtype) for critic in critics]
        actions, valid = propose(player, critics, targets, config)
        log_critics = [critic_scores(critic, actions, True, dtype) for critic in critics]
        log_reality = reality_expert(valid, config.smoothing, dtype)
        consensus, rewards = pay(log_reality, log_critics, valid, config)
        critic_probs = [log_critic.exp().masked_fill(~valid, 0) for log_critic in log_critics]
        if isinstance(critic_logits, Tensor):
            reported = critic_probs[0]
        else:
            reported = torch.stack(critic_probs) if critic_probs else None
        return RewardLandscape(actions, valid, log_reality.exp(), reported, consensus, rewards)


def propose(player: Tensor, critics: Sequence[Tensor], targets: Tensor, config: AvataRLConfig) -> tuple[Tensor, Tensor]:
    """Active actions under ``config``; see :func:`active_actions`.

    Raises:
        ValueError: ``top_k`` is larger than the vocabulary.
    """
    vocabulary = min(logits.shape[-1] for logits in (player, *critics))
    if config.top_k > vocabulary:
        raise ValueError(f"top_k is {config.top_k}; expected at most the vocabulary's {vocabulary} tokens")
    return active_actions(player, critics, targets, config.top_k, config.top_p)


def judge(
    player: Tensor, critics: Sequence[Tensor], targets: Tensor, config: AvataRLConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """What a loss needs of the landscape: actions, valid and rewards (N, A) each.

    ``player`` and ``critics`` are logits (N, V) in any floating dtype. No softmax of the critic is taken where the
    rewards do not depend on it.
    """
    dtype = compute_dtype(player.dtype)
    actions, valid = propose(player, critics, targets, config)
    log_critics = [critic_scores(critic, actions, config.needs_critic_normaliser, dtype) for critic in critics]
    _, rewards = pay(reality_expert(valid, config.smoothing, dtype), log_critics, valid, config)
    return actions, valid, rewards


def critic_scores(logits: Tensor, actions: Tensor, normalised: bool, dtype: torch.dtype) -> Tensor:
    """log p_C of the actions (N, A) in ``dtype``; without ``normalised``, only up to a constant per position."""
    scores = logits.gather(1, actions).to(dtype)
    return scores - logits.to(dtype).logsumexp(dim=-1, keepdim=True) if normalised else scores


def reality_expert(valid: Tensor, smoothing: float, dtype: torch.dtype) -> Tensor:
    """log p_R (N, A): the target has 1−ε, the other active actions share ε; −∞ where not valid.

    Alone, the target has everything.
    """
    num_active = valid.sum(dim=1, keepdim=True).to(dtype)  # (N, 1)
    log_reality = torch.log(smoothing / (num_active - 1).clamp(min=1)).expand(valid.shape)
    log_target = torch.log1p(-smoothing * (num_active > 1).to(dtype))
    log_reality = torch.cat([log_target, log_reality[:, 1:]], dim=1)
    return log_reality.masked_fill(~valid, -torch.inf)


def pay(
    log_reality: Tensor, log_critics: Sequence[Tensor], valid: Tensor, config: AvataRLConfig
) -> tuple[Tensor, Tensor]:
    """Consensus and rewards (N, A) of active actions, from the experts' log-probabilities at them.

    ``log_critics`` may miss a constant per position unless ``config.needs_critic_normaliser``.
    """
    weights = config.critic_weights(len(log_critics))
    experts = [(config.reality_weight, log_reality), *zip(weights, log_critics, strict=True)]
    experts = [(weight, log_probs) for weight, log_probs in experts if weight > 0]  # never 0 · −∞
    blend = _geometric_pool if config.pool == "geometric" else _arithmetic_pool
    consensus, log_mass = blend(experts, valid)

    num_active = valid.sum(dim=1, keepdim=True)
    if config.threshold == "none":
        kept = valid
    else:
        mass = log_mass.exp() if config.threshold == "mass" else 1.0
        kept = (consensus > mass / num_active) | (valid & (num_active == 1))
    rewards = torch.where(kept, config.reward_scale * consensus, 0.0)
    if config.reward_cap is not None:
        largest = rewards.amax(dim=1, keepdim=True)
        rewards = torch.where(largest > config.reward_cap, rewards * (config.reward_cap / largest), rewards)
    return consensus, rewards


def _geometric_pool(experts: list[tuple[float, Tensor]], valid: Tensor) -> tuple[Tensor, Tensor]:
    """p ∝ Π p_i^w_i on the active actions (N, A), and the log of its mass before normalisation (N, 1)."""
    log_blend = sum(weight * log_probs for weight, log_probs in experts).masked_fill(~valid, -torch.inf)
    # Experts that veto every action between them (ε = 0 and a critic that rules the target out) leave the text's.
    vetoed = log_blend.amax(dim=1, keepdim=True) == -torch.inf
    log_target = log_blend[:, :1].masked_fill(vetoed, 0.0)
    log_blend = torch.cat([log_target, log_blend[:, 1:]], dim=1)
    log_mass = log_blend.logsumexp(dim=1, keepdim=True)
    return (log_blend - log_mass).exp(), log_mass


def _arithmetic_pool(experts: list[tuple[float, Tensor]], valid: Tensor) -> tuple[Tensor, Tensor]:
    """p = Σ w_i p_i on the active actions (N, A); what a critic gives to other tokens goes to the target."""
    consensus = sum(weight * log_probs.exp() for weight, log_probs in experts).masked_fill(~valid, 0.0)
    target = (1 - consensus[:, 1:].sum(dim=1, keepdim=True)).clamp(min=0)  # a sum may round to above 1
    consensus = torch.cat([target, consensus[:, 1:]], dim=1)
    return consensus, torch.zeros_like(target)
