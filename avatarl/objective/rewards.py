"""From active actions to rewards: the experts, their consensus, the threshold and the cap (docs/method.md).

Shapes: N positions, V vocabulary, A columns of actions, C critics. With ``tail="sample"`` the A columns of active
actions are followed by those of sampled ones. Everything stays in logs until the consensus.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .actions import active_actions, sums_of_each
from .checks import check_logits, compute_dtype
from .config import AvataRLConfig
from .critics import LiveCritic, as_asked
from .schedule import Scheduled, Weight, expert_weights, smoothing, weighted
from .stored import StoredCritic


class RewardLandscape(NamedTuple):
    """What every action of every position is paid, and why. Zero where ``valid`` is False."""

    actions: Tensor  # (N, A) int64; column 0 is the target
    valid: Tensor  # (N, A) bool
    reality: Tensor  # (N, A) p_R, sums to 1
    critic: Tensor | None  # (N, A) p_C over the whole vocabulary; (C, N, A) for a list of critics; None without one
    consensus: Tensor  # (N, A) p, sums to 1 together with the tail mass
    rewards: Tensor  # (N, A) r ≥ 0
    tail_mass: Tensor  # (N,) what the consensus leaves to all other tokens; 0 but for ``tail="dense"``


class DenseTail(NamedTuple):
    """What a critic's whole distribution adds to the rewards: amount · p_C(a) for every token of the vocabulary."""

    logits: Tensor  # (N, V)
    largest: Tensor  # (N,), of the logits
    log_total: Tensor  # (N,), log Σ exp(logits − largest)
    amount: Tensor  # (N,)

    def at(self, tokens: Tensor) -> Tensor:
        """What it adds at tokens (N, S)."""
        return self._paid(self.logits.gather(1, tokens))

    def everywhere(self) -> Tensor:
        """What it adds at every token (N, V)."""
        return self._paid(self.logits)

    def _paid(self, logits: Tensor) -> Tensor:
        amount = self.amount * (-self.log_total).exp()
        return (logits - self.largest.unsqueeze(1)).exp_().mul_(amount.unsqueeze(1))


class Judgement(NamedTuple):
    """What a loss needs of the landscape."""

    actions: Tensor  # (N, A) int64
    valid: Tensor  # (N, A) bool
    rewards: Tensor  # (N, A)
    dense: Sequence[DenseTail] = ()  # what ``rewards`` hold a part of, and all other tokens the rest
    estimated: Tensor | None = None  # (N,) share of active actions that a cached critic had to estimate


def reward_landscape(
    player_logits: Tensor,
    critic_logits: Tensor | StoredCritic | Sequence[Tensor | StoredCritic] | None,
    targets: Tensor,
    config: AvataRLConfig = AvataRLConfig.article(),
    vocab_size: int | None = None,
    uniforms: Tensor | None = None,
) -> RewardLandscape:
    """Judge every position: active actions, experts, consensus and rewards.

    Args:
        player_logits: (…, V) floating; leading dimensions are flattened to N.
        critic_logits: (…, V) floating or what a cache holds of the critic; a list for several critics; None when
            ``critic_weight`` is 0.
        targets: (…) integer token ids in [0, V).
        config: The settings.
        vocab_size: Ids from here on are padding of the embedding: never active, outside both softmaxes.
        uniforms: (N, 1) in [0, 1), the draws of ``tail="sample"``; torch's own when None.

    Returns:
        RewardLandscape in float32, or float64 for float64 player logits. No gradient flows through it.

    Raises:
        ValueError: Shapes or dtypes do not fit; ``top_k`` is larger than the vocabulary.
    """
    player, critics, targets = check_logits(player_logits, critic_logits, targets, vocab_size)
    dtype = compute_dtype(player.dtype)
    with torch.no_grad():
        critics = [critic if isinstance(critic, StoredCritic) else critic.to(dtype) for critic in critics]
        uniforms = draws_of_tail(config, uniforms, player)
        judged, log_reality, consensus = _judge(player.to(dtype), critics, targets, config, uniforms, None)
        by_draws = config.tail_rule == "sample"
        answers = [as_asked(critic).log_probs_at(judged.actions, dtype, by_draws=by_draws)[0] for critic in critics]
        critic_probs = [log_probs.exp().masked_fill(~judged.valid, 0) for log_probs in answers]
        if isinstance(critic_logits, (Tensor, StoredCritic)):
            reported = critic_probs[0]
        else:
            reported = torch.stack(critic_probs) if critic_probs else None
        tail_mass = (1 - consensus.sum(dim=1)).clamp(min=0) if judged.dense else torch.zeros_like(consensus[:, 0])
        return RewardLandscape(
            judged.actions, judged.valid, log_reality.exp(), reported, consensus, judged.rewards, tail_mass
        )


def judge(
    player: Tensor,
    critics: Sequence[Tensor | StoredCritic],
    targets: Tensor,
    config: AvataRLConfig,
    uniforms: Tensor | None = None,
    scheduled: Scheduled | None = None,
) -> Judgement:
    """What a loss needs of the landscape.

    ``player`` and ``critics`` are logits (N, V) in any floating dtype, or what is stored of a critic. No softmax of a
    critic is taken where the rewards do not depend on it.
    """
    return _judge(player, critics, targets, config, uniforms, scheduled)[0]


def draws_of_tail(config: AvataRLConfig, uniforms: Tensor | None, like: Tensor) -> Tensor | None:
    """The draws (N, 1) that ``tail="sample"`` needs: those given, else torch's own."""
    if config.tail_rule != "sample" or uniforms is not None:
        return uniforms
    return torch.rand(like.shape[0], 1, device=like.device)


class Expert(NamedTuple):
    """One voice of the consensus."""

    weight: Weight
    log_probs: Tensor  # (N, A)


def _judge(
    player: Tensor,
    critics: Sequence[Tensor | StoredCritic],
    targets: Tensor,
    config: AvataRLConfig,
    uniforms: Tensor | None,
    scheduled: Scheduled | None,
) -> tuple[Judgement, Tensor, Tensor]:
    """The judgement, log p_R and the consensus (N, A)."""
    dtype = compute_dtype(player.dtype)
    actions, valid = propose(player, critics, targets, config)
    log_reality = reality_expert(valid, smoothing(config, scheduled), dtype)
    asked = [as_asked(critic) for critic in critics]
    asking = dict(normalised=config.needs_critic_normaliser, by_draws=config.tail_rule == "sample")
    answers = [critic.log_probs_at(actions, dtype, **asking) for critic in asked]
    estimated = _estimated_share([estimates for _, estimates in answers if estimates is not None], valid, dtype)

    # Whether an expert counts is known without asking the device: never 0 · −∞.
    reality_weight, critic_weights = expert_weights(config, len(critics), scheduled)
    counts = [weight > 0 for weight in config.critic_weights(len(critics))]
    heard = [
        (critic, Expert(weight, log_probs))
        for is_counted, critic, weight, (log_probs, _) in zip(counts, asked, critic_weights, answers, strict=True)
        if is_counted
    ]
    text = [Expert(reality_weight, log_reality)] if config.reality_weight > 0 or scheduled is not None else []
    pool = _geometric_pool if config.pool == "geometric" else _arithmetic_pool
    said = [Expert(weight, _by_rule(critic, actions, valid, log_p, config)) for critic, (weight, log_p) in heard]
    consensus, log_mass = pool([*text, *said], valid)
    if config.pool == "arithmetic" and config.tail_rule == "target":
        target = (1 - consensus[:, 1:].sum(dim=1, keepdim=True)).clamp(min=0)  # a sum may round to above 1
        consensus = torch.cat([target, consensus[:, 1:]], dim=1)

    num_active = valid.sum(dim=1, keepdim=True)
    if config.threshold == "none":
        kept = valid
    else:
        mass = log_mass.exp() if config.threshold == "mass" else 1.0
        # A NaN is not below the bar, so that the loss gets it and the guard can see it.
        kept = valid & (~(consensus <= mass / num_active.to(dtype)) | (num_active == 1))
    rewards = torch.where(kept, config.reward_scale * consensus, 0.0)
    scale = torch.full_like(log_mass, config.reward_scale)  # (N, 1), reward for a probability of 1
    if config.reward_cap is not None:
        known = rewards
        guesses = [is_estimate for is_counted, (_, is_estimate) in zip(counts, answers, strict=True) if is_counted]
        # By chance an estimate may be large, and the cap would follow it: not where it is all that is known.
        if config.tail_rule == "sample" and guesses and all(guess is not None for guess in guesses):
            known = rewards.masked_fill(torch.stack(guesses).all(dim=0), 0.0)
        largest = known.amax(dim=1, keepdim=True)
        is_above = largest > config.reward_cap
        rewards = torch.where(is_above, rewards * (config.reward_cap / largest), rewards)
        scale = torch.where(is_above, scale * (config.reward_cap / largest), scale)

    dense = []
    if config.tail_rule == "dense":
        dense = [DenseTail(critic.logits, *critic.normaliser, scale[:, 0] * weight) for critic, (weight, _) in heard]
    elif config.tail_rule == "sample" and heard:
        drawn = [critic.sample_outside(actions, valid, config.tail_samples, uniforms) for critic, _ in heard]
        tokens = torch.cat([tokens for tokens, _ in drawn], dim=1)  # (N, S)
        masses = [weight * mass for (_, (weight, _)), (_, mass) in zip(heard, drawn, strict=True)]
        tokens, is_first, mass = sums_of_each(tokens, torch.cat(masses, dim=1).to(dtype))
        is_first = is_first & ~(mass <= 0)
        mass = mass.masked_fill(~is_first, 0.0)
        actions, valid = torch.cat([actions, tokens], dim=1), torch.cat([valid, is_first], dim=1)
        log_reality = torch.cat([log_reality, torch.full_like(mass, -torch.inf)], dim=1)
        consensus = torch.cat([consensus, mass], dim=1)
        rewards = torch.cat([rewards, scale * mass], dim=1)
    return Judgement(actions, valid, rewards, dense, estimated), log_reality, consensus


def _by_rule(
    critic: LiveCritic | StoredCritic, actions: Tensor, valid: Tensor, log_probs: Tensor, config: AvataRLConfig
) -> Tensor:
    """What a critic says on the active actions (N, A) where its tail is one of them already.

    A geometric pool is normalised in any case, and a sum of probabilities can be completed at the end.
    """
    if config.tail_rule == "renormalise" and config.pool == "arithmetic":
        return log_probs.masked_fill(~valid, -torch.inf).log_softmax(dim=1)
    if config.tail_rule == "target" and config.pool == "geometric":
        log_outside = critic.log_outside(actions, valid, log_probs)
        return torch.cat([torch.logaddexp(log_probs[:, :1], log_outside), log_probs[:, 1:]], dim=1)
    return log_probs


def _geometric_pool(experts: Sequence[Expert], valid: Tensor) -> tuple[Tensor, Tensor]:
    """p ∝ Π p_i^w_i on the active actions (N, A), and the log of its mass before normalisation (N, 1)."""
    log_blend = sum(weighted(*expert) for expert in experts).masked_fill(~valid, -torch.inf)
    # Experts that veto every action between them (ε = 0 and a critic that rules the target out) leave the text's.
    vetoed = log_blend.amax(dim=1, keepdim=True) == -torch.inf
    log_target = log_blend[:, :1].masked_fill(vetoed, 0.0)
    log_blend = torch.cat([log_target, log_blend[:, 1:]], dim=1)
    log_mass = log_blend.logsumexp(dim=1, keepdim=True)
    return (log_blend - log_mass).exp(), log_mass


def _arithmetic_pool(experts: Sequence[Expert], valid: Tensor) -> tuple[Tensor, Tensor]:
    """p = Σ w_i p_i on the active actions (N, A), and log 1 (N, 1); what critics give to others is missing in it."""
    consensus = sum(weight * log_probs.exp() for weight, log_probs in experts).masked_fill(~valid, 0.0)
    return consensus, torch.zeros_like(consensus[:, :1])


def _estimated_share(estimates: Sequence[Tensor], valid: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The mean over cached critics of the share of active actions that they estimate (N,); None without one."""
    if not estimates:
        return None
    counts = [(estimate & valid).sum(dim=1) / valid.sum(dim=1) for estimate in estimates]
    return torch.stack(counts).mean(dim=0).to(dtype)


def propose(
    player: Tensor, critics: Sequence[Tensor | StoredCritic], targets: Tensor, config: AvataRLConfig
) -> tuple[Tensor, Tensor]:
    """Active actions under ``config``; see :func:`active_actions`.

    Raises:
        ValueError: ``top_k`` is larger than the vocabulary.
    """
    vocabulary = min(logits.shape[-1] for logits in (player, *(c for c in critics if isinstance(c, Tensor))))
    if config.top_k > vocabulary:
        raise ValueError(f"top_k is {config.top_k}; expected at most the vocabulary's {vocabulary} tokens")
    return active_actions(player, critics, targets, config.top_k, config.top_p, config.player_proposes)


def reality_expert(valid: Tensor, smoothing: Weight, dtype: torch.dtype) -> Tensor:
    """log p_R (N, A): the target has 1−ε, the other active actions share ε; −∞ where not valid.

    Alone, the target has everything.
    """
    num_active = valid.sum(dim=1, keepdim=True).to(dtype)  # (N, 1)
    log_reality = torch.log(smoothing / (num_active - 1).clamp(min=1)).expand(valid.shape)
    log_target = torch.log1p(-smoothing * (num_active > 1).to(dtype))
    log_reality = torch.cat([log_target, log_reality[:, 1:]], dim=1)
    return log_reality.masked_fill(~valid, -torch.inf)
