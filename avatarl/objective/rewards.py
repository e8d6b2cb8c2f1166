"""From logits to rewards: active actions, experts, their consensus, the threshold and the cap (docs/method.md).

Shapes: N positions, V vocabulary, K proposals per model, C critics, A = 1 + K + C·K columns of actions, fewer where a
cache stores fewer than K tokens or the player proposes none. A token that was listed before is masked, never removed:
no shape depends on data, and the host never waits. With ``tail="sample"`` the columns of active actions are followed by
those of sampled ones. Everything stays in logs until the consensus.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .answers import Answers, CachedAnswers, LiveAnswers, as_answers, is_one
from .config import DEFAULT_TAIL, AvataRLConfig
from .policy import DenseTail, compute_dtype, sums_of_each
from .schedule import Scheduled, Weight


class RewardLandscape(NamedTuple):
    """What every action of every position earns, and why. Zero where ``valid`` is False."""

    actions: Tensor  # (N, A) int64; column 0 is the target
    valid: Tensor  # (N, A) bool
    reality: Tensor  # (N, A) p_R, sums to 1
    critic: Tensor | None  # (N, A) p_C over the whole vocabulary; (C, N, A) for a list of critics; None without one
    consensus: Tensor  # (N, A) p, sums to 1 together with the tail mass
    rewards: Tensor  # (N, A) r ≥ 0
    tail_mass: Tensor  # (N,) what the consensus leaves to all other tokens; 0 but for ``tail="dense"``


class Rewards(NamedTuple):
    """What a loss needs of the landscape, and what only the landscape reports."""

    actions: Tensor  # (N, A) int64
    valid: Tensor  # (N, A) bool
    rewards: Tensor  # (N, A)
    dense: Sequence[DenseTail]  # what ``rewards`` hold a part of, and all other tokens the rest
    estimated: Tensor | None  # (N,) share of active actions that a cached critic had to estimate
    favourites: Sequence[int]  # the column of each critic's most likely token; none for a cache without proposals
    log_reality: Tensor  # (N, A) log p_R
    consensus: Tensor  # (N, A) p


def reward_landscape(
    player_logits: Tensor,
    critic_logits: Tensor | CachedAnswers | Sequence[Tensor | CachedAnswers] | None,
    targets: Tensor,
    config: AvataRLConfig = AvataRLConfig.article(),
    vocab_size: int | None = None,
    uniforms: Tensor | None = None,
) -> RewardLandscape:
    """Compute the rewards of every position, and what they follow from: actions, experts and consensus.

    Args:
        player_logits: (…, V) floating; leading dimensions are flattened to N.
        critic_logits: (…, V) floating, or what a cache holds of the critic; a list for several critics; None when
            ``critic_weight`` is 0.
        targets: (…) integer token ids in [0, V).
        config: The settings.
        vocab_size: Ids from here on are padding of the embedding: never active, outside both softmaxes.
        uniforms: (N, 1) in [0, 1), for the tokens that ``tail="sample"`` draws; torch's own when None.

    Returns:
        RewardLandscape in float32, or float64 for float64 player logits. No gradient flows through it.

    Raises:
        ValueError: Shapes or dtypes do not fit; ``top_k`` is larger than the vocabulary.
    """
    player, critics = flat_logits(player_logits, as_answers(critic_logits), targets, vocab_size)
    if config.top_k > player.shape[-1]:
        raise ValueError(f"top_k is {config.top_k}; expected at most the vocabulary's {player.shape[-1]} tokens")
    config.critic_weights(len(critics))
    dtype = compute_dtype(player.dtype)
    with torch.no_grad():
        critics = [critic.cast(dtype) for critic in critics]
        if config.tail_rule == "sample" and uniforms is None:
            uniforms = torch.rand(len(player), 1, device=player.device)
        found = compute_rewards(player.to(dtype), critics, targets.reshape(-1).long(), config, uniforms)
        by_draws = config.tail_rule == "sample"
        log_probs = [critic.log_probs_at(found.actions, dtype, by_draws=by_draws)[0] for critic in critics]
        probs = [each.exp().masked_fill(~found.valid, 0) for each in log_probs]
        reported = probs[0] if is_one(critic_logits) else torch.stack(probs) if probs else None
        consensus = found.consensus
        tail_mass = (1 - consensus.sum(dim=1)).clamp(min=0) if found.dense else torch.zeros_like(consensus[:, 0])
        return RewardLandscape(
            found.actions, found.valid, found.log_reality.exp(), reported, consensus, found.rewards, tail_mass
        )


def flat_logits(
    player_logits: Tensor, critics: Sequence[Answers], targets: Tensor, vocab_size: int | None
) -> tuple[Tensor, list[Answers]]:
    """Check logits (…, V) and answers against ``targets`` (…), and flatten them to N positions.

    Raises:
        ValueError: with the shapes or dtypes found.
    """
    player = LiveAnswers(player_logits)
    player.check(targets, None, vocab_size, "player_logits")
    width = player_logits.shape[-1]
    for critic in critics:
        critic.check(targets, width, vocab_size)
    vocabulary = width if vocab_size is None else vocab_size
    return player.flat(vocabulary).logits, [critic.flat(vocabulary) for critic in critics]


def compute_rewards(
    player: Tensor,
    critics: Sequence[LiveAnswers | CachedAnswers],
    targets: Tensor,
    config: AvataRLConfig,
    uniforms: Tensor | None = None,
    scheduled: Scheduled | None = None,
) -> Rewards:
    """The rewards of N positions, for the player's logits (N, V) and targets int64 (N,).

    No softmax of a critic is computed where the rewards do not depend on it. ``uniforms`` (N, 1) are for the tokens
    that ``tail="sample"`` draws.
    """
    dtype, tail = compute_dtype(player.dtype), config.tail or DEFAULT_TAIL[config.pool]
    # Without these the rewards depend on a critic's logits at the actions alone.
    normalised = tail != "renormalise" or config.threshold == "mass"
    actions, valid, favourites = active_actions(player, critics, targets, config)
    num_active = valid.sum(dim=1, keepdim=True)  # (N, 1)
    log_reality = _log_reality(valid, config.smoothing if scheduled is None else scheduled.smoothing, dtype)
    answers = [critic.log_probs_at(actions, dtype, normalised, by_draws=tail == "sample") for critic in critics]
    estimates = [is_estimate for _, is_estimate in answers if is_estimate is not None]
    shares = [(is_estimate & valid).sum(dim=1) / num_active[:, 0] for is_estimate in estimates]

    # Whether an expert has a weight is known without asking the device: never 0 · −∞.
    reality_weight, critic_weights = _expert_weights(config, len(critics), scheduled)
    experts = [] if reality_weight is None else [(reality_weight, log_reality)]
    weighing = [
        (critic, weight, log_probs, is_estimate)
        for critic, weight, (log_probs, is_estimate) in zip(critics, critic_weights, answers, strict=True)
        if weight is not None
    ]
    for critic, weight, log_probs, _ in weighing:
        if config.pool == "arithmetic" and tail == "renormalise":
            log_probs = log_probs.masked_fill(~valid, -torch.inf).log_softmax(dim=1)
        elif config.pool == "geometric" and tail == "target":
            log_outside = critic.log_outside(actions, valid, log_probs)
            log_probs = torch.cat([torch.logaddexp(log_probs[:, :1], log_outside), log_probs[:, 1:]], dim=1)
        experts.append((weight, log_probs))
    if scheduled is not None and critics:  # a weight may have come to 0
        experts = [(weight, torch.where(weight > 0, log_probs, 0.0)) for weight, log_probs in experts]
    if config.pool == "geometric":
        consensus, mass = _geometric_pool(experts, valid)
    else:
        consensus = sum(weight * log_probs.exp() for weight, log_probs in experts).masked_fill(~valid, 0.0)
        if tail == "target":
            target = (1 - consensus[:, 1:].sum(dim=1, keepdim=True)).clamp(min=0)  # a sum may round to above 1
            consensus = torch.cat([target, consensus[:, 1:]], dim=1)

    kept = valid
    if config.threshold != "none":
        bar = (mass if config.threshold == "mass" else 1.0) / num_active.to(dtype)
        # A NaN is not below the bar, so that the loss gets it and the guard can see it.
        kept = valid & (~(consensus <= bar) | (num_active == 1))
    rewards = torch.where(kept, config.reward_scale * consensus, 0.0)
    scale = torch.full_like(rewards[:, :1], config.reward_scale)  # (N, 1), reward for a probability of 1
    if config.reward_cap is not None:
        known = rewards
        # By chance an estimate may be large, and the cap would follow it: not where it is all that is known.
        if tail == "sample" and weighing and all(is_estimate is not None for *_, is_estimate in weighing):
            known = rewards.masked_fill(torch.stack([guess for *_, guess in weighing]).all(dim=0), 0.0)
        largest = known.amax(dim=1, keepdim=True)
        is_above = largest > config.reward_cap
        rewards = torch.where(is_above, rewards * (config.reward_cap / largest), rewards)
        scale = torch.where(is_above, scale * (config.reward_cap / largest), scale)

    dense = []
    if tail == "dense":
        dense = [critic.dense_tail(scale[:, 0] * weight) for critic, weight, *_ in weighing]
    elif tail == "sample" and weighing:
        drawn = [critic.sample_outside(actions, valid, config.tail_samples, uniforms) for critic, *_ in weighing]
        tokens = torch.cat([tokens for tokens, _ in drawn], dim=1)  # (N, S)
        masses = [weight * mass for (_, weight, *_), (_, mass) in zip(weighing, drawn, strict=True)]
        tokens, is_first, masses = sums_of_each(tokens, torch.cat(masses, dim=1).to(dtype))
        is_first = is_first & ~(masses <= 0)
        masses = masses.masked_fill(~is_first, 0.0)
        actions, valid = torch.cat([actions, tokens], dim=1), torch.cat([valid, is_first], dim=1)
        log_reality = torch.cat([log_reality, torch.full_like(masses, -torch.inf)], dim=1)
        consensus = torch.cat([consensus, masses], dim=1)
        rewards = torch.cat([rewards, scale * masses], dim=1)
    estimated = torch.stack(shares).mean(dim=0).to(dtype) if shares else None
    return Rewards(actions, valid, rewards, dense, estimated, favourites, log_reality, consensus)


def _expert_weights(
    config: AvataRLConfig, num_critics: int, scheduled: Scheduled | None
) -> tuple[Weight | None, Sequence[Weight | None]]:
    """The weight of the text, and that of each critic; None for one that never has any.

    Their sum does not change over time. :meth:`AvataRLConfig.critic_weights` has checked their number.
    """
    weight, text = config.critic_weight, config.reality_weight
    weights = weight if isinstance(weight, tuple) else (weight / max(1, num_critics),) * num_critics
    weights = weights if num_critics else ()
    if scheduled is None:
        return text or None, [weight or None for weight in weights]
    now = [scheduled.critic_factors[i] * weight for i, weight in enumerate(weights)]
    text = text + sum(weight - part for weight, part in zip(weights, now, strict=True))
    return text, [part if weight else None for weight, part in zip(weights, now, strict=True)]


def active_actions(
    player: Tensor, critics: Sequence[LiveAnswers | CachedAnswers], targets: Tensor, config: AvataRLConfig
) -> tuple[Tensor, Tensor, list[int]]:
    """List the target, the player's proposals and each critic's proposals, each token once.

    Returns:
        actions: (N, A) int64 token ids; column 0 is the target.
        valid: (N, A) bool, False where a column repeats an earlier active one or was cut by ``top_p``.
        favourites: The column of each critic's most likely token; none for a cache that stores no proposals.
    """
    columns = [targets.unsqueeze(1)]  # (N, 1), then (N, K) each
    masks = [torch.ones_like(columns[0], dtype=torch.bool)]
    favourites, width = [], 1
    models = [*([LiveAnswers(player)] if config.player_proposes else []), *critics]
    for model in models:
        tokens, kept = model.proposals(config.top_k, config.top_p)
        for earlier, earlier_kept in zip(columns, masks, strict=True):
            same = tokens.unsqueeze(2) == earlier.unsqueeze(1)  # (N, K, columns of the earlier list)
            kept = kept & ~(same & earlier_kept.unsqueeze(1)).any(dim=2)
        columns.append(tokens)
        masks.append(kept)
        favourites += [width] if tokens.shape[1] else []
        width += tokens.shape[1]
    return torch.cat(columns, dim=1), torch.cat(masks, dim=1), favourites[int(config.player_proposes) :]


def _log_reality(valid: Tensor, smoothing: Weight, dtype: torch.dtype) -> Tensor:
    """log p_R (N, A): the target has 1−ε, the other active actions share ε; −∞ where not valid.

    Alone, the target has everything.
    """
    num_active = valid.sum(dim=1, keepdim=True).to(dtype)  # (N, 1)
    log_reality = torch.log(smoothing / (num_active - 1).clamp(min=1)).expand(valid.shape)
    log_target = torch.log1p(-smoothing * (num_active > 1).to(dtype))
    log_reality = torch.cat([log_target, log_reality[:, 1:]], dim=1)
    return log_reality.masked_fill(~valid, -torch.inf)


def _geometric_pool(experts: Sequence[tuple[Weight, Tensor]], valid: Tensor) -> tuple[Tensor, Tensor]:
    """p ∝ Π p_i^w_i on the active actions (N, A), and its mass before normalisation (N, 1), of log p_i (N, A)."""
    log_blend = sum(weight * log_probs for weight, log_probs in experts).masked_fill(~valid, -torch.inf)
    # Experts that veto every action between them (ε = 0 and a critic that rules the target out) leave the text's.
    vetoed = log_blend.amax(dim=1, keepdim=True) == -torch.inf
    log_target = log_blend[:, :1].masked_fill(vetoed, 0.0)
    log_blend = torch.cat([log_target, log_blend[:, 1:]], dim=1)
    log_mass = log_blend.logsumexp(dim=1, keepdim=True)
    return (log_blend - log_mass).exp(), log_mass.exp()
