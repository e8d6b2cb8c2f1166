"""The method in plain, differentiable PyTorch: what every faster path has to agree with in float64.

A set of tokens is a mask over the vocabulary, so a token that is listed twice is in it once. Nothing here is fast, and
autograd of :func:`loss` is the oracle of gradients.

Shapes: N positions, V vocabulary, S sampled actions. Player and critics are logits (N, V), targets int64 (N,).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import AvataRLConfig, BaselineConfig


class Landscape(NamedTuple):
    """The rewards of every token, and what they follow from; all (N, V)."""

    active: Tensor  # bool
    reality: Tensor  # p_R, the text's distribution on the active actions
    consensus: Tensor  # p, the blend of the experts
    rewards: Tensor  # r


def landscape(player: Tensor, critics: Sequence[Tensor], targets: Tensor, config: AvataRLConfig) -> Landscape:
    """Compute the rewards; tokens that ``tail="sample"`` would draw have their expectation, that of ``dense``."""
    is_target = F.one_hot(targets, player.shape[1]).bool()
    active = active_actions(player, critics, is_target, config)
    n = active.double().sum(1, keepdim=True)  # (N, 1)

    smoothing = config.smoothing * (n > 1).double()  # alone, the target has everything
    reality = torch.where(is_target, 1 - smoothing, smoothing / (n - 1).clamp(min=1)) * active
    experts = [(config.reality_weight, reality)]
    for weight, logits in zip(config.critic_weights(len(critics)), critics, strict=True):
        p = logits.softmax(1)
        if config.tail_rule == "target":
            p = p * active + (p * ~active).sum(1, keepdim=True) * is_target
        elif config.tail_rule == "renormalise" and config.pool == "arithmetic":
            p = p * active / (p * active).sum(1, keepdim=True)
        experts.append((weight, p))
    experts = [(weight, p) for weight, p in experts if weight > 0]

    mass = torch.ones_like(n)
    if config.pool == "geometric":
        blend = torch.stack([p**weight for weight, p in experts]).prod(0) * active
        mass = blend.sum(1, keepdim=True)
        consensus = torch.where(mass > 0, blend / mass, is_target.to(blend))  # where all is vetoed, the text
    else:
        consensus = sum(weight * p for weight, p in experts)

    bar = {"mean": 1 / n, "mass": mass / n, "none": torch.full_like(n, -1)}[config.threshold]
    rewards = torch.where((consensus > bar) | (n == 1), config.reward_scale * consensus, 0.0)
    if config.reward_cap is not None:
        largest = (rewards * active).amax(1, keepdim=True)
        rewards = rewards * (config.reward_cap / largest).clamp(max=1)
    return Landscape(active, reality, consensus, rewards)


def active_actions(player: Tensor, critics: Sequence[Tensor], is_target: Tensor, config: AvataRLConfig) -> Tensor:
    """The target, and each model's most likely tokens (N, V) bool."""
    active = is_target
    for logits in (player, *critics) if config.player_proposes else critics:
        tokens = logits.topk(config.top_k, dim=1).indices
        p = logits.softmax(1).gather(1, tokens)
        # The shortest prefix whose probability reaches top_p; the first token always stays.
        kept = (
            p.cumsum(1) - p < (config.top_p or 1) if config.top_p not in (None, 1) else torch.ones_like(p, dtype=bool)
        )
        active = active | torch.zeros_like(active).scatter(1, tokens, kept)
    return active


def loss(
    objective: str,
    player: Tensor,
    critics: Sequence[Tensor],
    targets: Tensor,
    config: AvataRLConfig,
    baseline: BaselineConfig | None = None,
    *,
    drawn: Tensor | None = None,
    snapshot: Tensor | None = None,
    ignore_index: int = -100,
    num_valid: float | None = None,
) -> Tensor:
    """The loss of any objective: a sum over the positions that count, divided by their number.

    ``drawn`` (N, S) are the actions that ``reinforce`` drew from the policy, and ``ppo`` from the ``snapshot``, logits
    (N, V). Averaged over draws, the gradient of ``reinforce`` is that of ``expected_reward``.
    """
    counted = targets != ignore_index
    player, targets, critics = player[counted], targets[counted], [logits[counted] for logits in critics]
    baseline, at_target = baseline or BaselineConfig(), targets.unsqueeze(1)
    log_pi = player.log_softmax(1)
    likelihood = log_pi.gather(1, at_target).squeeze(1)  # (N,)
    if objective == "cross_entropy":
        losses = -likelihood
    elif objective == "label_smoothing":
        losses = -(1 - baseline.label_smoothing) * likelihood - baseline.label_smoothing * log_pi.mean(1)
    elif objective == "distillation":
        alpha = baseline.distillation_alpha
        divergences = [F.kl_div(log_pi, c.log_softmax(1), reduction="none", log_target=True).sum(1) for c in critics]
        losses = -alpha * likelihood + (1 - alpha) * sum(divergences) / max(1, len(critics))
    else:
        found = landscape(player.detach(), critics, targets, config)
        rewards = found.rewards  # constants for the gradient
        if config.per_action_mean:
            rewards = rewards / found.active.double().sum(1, keepdim=True)
        log_pi = (player / config.temperature).log_softmax(1)
        entropy = -(log_pi.exp() * log_pi).sum(1)
        if objective == "avatarl":
            gain = (rewards * log_pi).sum(1)
        elif objective == "expected_reward":
            gain = (rewards * log_pi.exp()).sum(1)
        else:
            behaviour = log_pi if snapshot is None else (snapshot[counted] / config.temperature).log_softmax(1)
            gain = sampled_gain(objective, rewards, log_pi, behaviour.detach(), drawn[counted], baseline.ppo_clip)
        losses = -gain - config.entropy_coef * entropy
    return losses.sum() / (len(losses) if num_valid is None else num_valid)


def sampled_gain(
    objective: str, rewards: Tensor, log_pi: Tensor, log_behaviour: Tensor, drawn: Tensor, clip: float
) -> Tensor:
    """The mean over drawn actions of ratio · advantage (N,); the baseline is the mean reward of the other draws."""
    earned = rewards.gather(1, drawn)  # (N, S)
    others = (earned.sum(1, keepdim=True) - earned) / max(1, drawn.shape[1] - 1)
    ratio = (log_pi - log_behaviour).gather(1, drawn).exp()
    gain = ratio * (earned - others)
    if objective == "ppo":
        gain = torch.minimum(gain, ratio.clamp(1 - clip, 1 + clip) * (earned - others))
    return gain.mean(1)
