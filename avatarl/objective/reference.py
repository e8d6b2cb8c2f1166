"""The oracle: every objective at one position, in plain Python and float64, written to be read.

It imports nothing of the package. Everything faster is accepted by agreeing with it. A critic is a list of logits; a
position's result is a dictionary. Gradients are over the player's logits and are checked by finite differences.
"""

from __future__ import annotations

import math


def log_softmax(logits: list[float]) -> list[float]:
    largest = max(logits)
    log_total = math.log(sum(math.exp(x - largest) for x in logits))
    return [x - largest - log_total for x in logits]


def softmax(logits: list[float]) -> list[float]:
    return [math.exp(x) for x in log_softmax(logits)]


def proposals(logits: list[float], top_k: int, top_p: float | None) -> list[int]:
    """One model's top tokens in falling order, cut to the shortest prefix whose probability reaches ``top_p``."""
    probs = softmax(logits)
    ranked = sorted(range(len(logits)), key=lambda token: -logits[token])[:top_k]
    if top_p is None or top_p == 1:
        return ranked
    kept, reached = [], 0.0
    for token in ranked:
        kept.append(token)
        reached += probs[token]
        if reached >= top_p:
            break
    return kept


def active_actions(player, critics, target, top_k, top_p=None, player_proposes=True) -> list[int]:
    """The target, the player's proposals, each critic's proposals; every token once, in this order."""
    actions = [target]
    for logits in (player, *critics) if player_proposes else critics:
        actions += [token for token in proposals(logits, top_k, top_p) if token not in actions]
    return actions


def landscape(
    player,
    critics,
    target,
    *,
    top_k=16,
    player_proposes=True,
    top_p=None,
    smoothing=0.1,
    pool="geometric",
    tail=None,
    tail_samples=16,
    reality_weight=0.7,
    critic_weight=0.3,
    reward_scale=100.0,
    threshold="mean",
    reward_cap=1.5,
    uniform=None,
) -> dict:
    """Actions, experts, consensus and rewards of one position; lists in the order of ``actions``.

    ``tail_rewards`` are those of all other tokens, by token: every one for ``tail="dense"``, the sampled ones for
    ``tail="sample"``, at points of the critics' distributions that ``uniform`` in [0, 1) decides.
    """
    tail = tail or {"geometric": "renormalise", "arithmetic": "target"}[pool]
    actions = active_actions(player, critics, target, top_k, top_p, player_proposes)
    n = len(actions)
    if n == 1:
        reality = [1.0]
    else:
        reality = [1 - smoothing] + [smoothing / (n - 1)] * (n - 1)
    distributions = [softmax(critic) for critic in critics]
    critic_probs = [[probs[token] for token in actions] for probs in distributions]
    if not isinstance(critic_weight, (list, tuple)):
        critic_weight = [critic_weight / len(critics) for _ in critics]
    outside = [[0.0 if token in actions else p for token, p in enumerate(probs)] for probs in distributions]
    heard = [
        critic_probs_by_rule(probs, sum(others), tail, threshold)
        for probs, others in zip(critic_probs, outside, strict=True)
    ]
    experts = [(reality_weight, reality), *zip(critic_weight, heard, strict=True)]
    experts = [(weight, probs) for weight, probs in experts if weight > 0]

    if pool == "geometric":
        blend = [math.prod(probs[i] ** weight for weight, probs in experts) for i in range(n)]
        mass = sum(blend)
        consensus = [1.0] + [0.0] * (n - 1) if mass == 0 else [x / mass for x in blend]
    else:
        consensus = [sum(weight * probs[i] for weight, probs in experts) for i in range(n)]
        mass = 1.0

    bar = {"mean": 1 / n, "mass": mass / n, "none": -1.0}[threshold]
    rewards = [0.0 if p <= bar and n > 1 else reward_scale * p for p in consensus]  # a NaN stays
    factor = 1.0
    if reward_cap is not None and max(rewards) > reward_cap:
        factor = reward_cap / max(rewards)
        rewards = [r * factor for r in rewards]

    tail_rewards: dict[int, float] = {}
    for weight, others in zip(critic_weight, outside, strict=True) if tail in ("dense", "sample") else ():
        if weight == 0:
            continue
        rest = sum(others)
        if tail == "sample" and rest != 0:
            points = [(uniform + i) / tail_samples for i in range(tail_samples)]
            drawn = [draw([p / rest for p in others], point) for point in points]
            others = [rest * drawn.count(token) / tail_samples for token in range(len(others))]
        for token, p in enumerate(others):
            if p != 0:
                tail_rewards[token] = tail_rewards.get(token, 0.0) + reward_scale * factor * weight * p
    return dict(
        actions=actions,
        reality=reality,
        critic=critic_probs,
        consensus=consensus,
        rewards=rewards,
        tail_rewards=tail_rewards,
    )


def critic_probs_by_rule(probs: list[float], rest: float, tail: str, threshold: str) -> list[float]:
    """A critic's probabilities of the actions, the target first, with ``rest``, those of other tokens, by the rule."""
    if (
        tail == "renormalise" and threshold != "mass"
    ):  # whose bar is the blend's mass with the probabilities as they are
        return [p / sum(probs) for p in probs]
    if tail == "target":
        return [probs[0] + rest, *probs[1:]]
    return probs


def _result(loss: float, gradient: list[float]) -> dict:
    return dict(loss=loss, gradient=gradient)


def _policy(player, temperature):
    largest = max(player)
    log_probs = log_softmax([(z - largest) / temperature for z in player])
    probs = [math.exp(x) for x in log_probs]
    entropy = -sum(p * x for p, x in zip(probs, log_probs, strict=True) if p != 0)
    return log_probs, probs, entropy


def _rewards_by_token(player, critics, target, per_action_mean, settings) -> dict[int, float]:
    judged = landscape(player, critics, target, **settings)
    n = len(judged["actions"])
    rewards = [r / n for r in judged["rewards"]] if per_action_mean else judged["rewards"]
    return dict(zip(judged["actions"], rewards, strict=True)) | judged["tail_rewards"]


def avatarl(player, critics, target, *, entropy_coef=0.01, temperature=1.0, per_action_mean=False, **settings) -> dict:
    """−Σ r log π − β H(π), with π at ``temperature``."""
    rewards = _rewards_by_token(player, critics, target, per_action_mean, settings)
    log_probs, probs, entropy = _policy(player, temperature)
    loss = -sum(r * log_probs[a] for a, r in rewards.items() if r != 0) - entropy_coef * entropy
    total = sum(rewards.values())
    gradient = [
        (total * p - rewards.get(a, 0.0) + entropy_coef * p * (log_p + entropy)) / temperature
        for a, (p, log_p) in enumerate(zip(probs, log_probs, strict=True))
    ]
    return _result(loss, gradient)


def expected_reward(
    player, critics, target, *, entropy_coef=0.01, temperature=1.0, per_action_mean=False, **settings
) -> dict:
    """−Σ π r − β H(π)."""
    rewards = _rewards_by_token(player, critics, target, per_action_mean, settings)
    log_probs, probs, entropy = _policy(player, temperature)
    expected = sum(probs[a] * r for a, r in rewards.items())
    gradient = [
        (-p * (rewards.get(a, 0.0) - expected) + entropy_coef * p * (log_p + entropy)) / temperature
        for a, (p, log_p) in enumerate(zip(probs, log_probs, strict=True))
    ]
    return _result(-expected - entropy_coef * entropy, gradient)


def draw(probs: list[float], uniform: float) -> int:
    """The token whose interval of the cumulative distribution holds ``uniform`` in [0, 1)."""
    reached = 0.0
    for token, p in enumerate(probs):
        reached += p
        if uniform < reached:
            return token
    return len(probs) - 1


def _advantages(rewards: list[float]) -> list[float]:
    others = len(rewards) - 1
    return [r - (sum(rewards) - r) / others if others else r for r in rewards]


def reinforce(
    player, critics, target, uniforms, *, entropy_coef=0.01, temperature=1.0, per_action_mean=False, **settings
) -> dict:
    """−(1/S) Σ (r − mean of the others) log π(a_s) − β H(π); the loss reported is −(1/S) Σ (r − …)."""
    rewards = _rewards_by_token(player, critics, target, per_action_mean, settings)
    log_probs, probs, entropy = _policy(player, temperature)
    drawn = [draw(probs, u) for u in uniforms]
    advantages = _advantages([rewards.get(a, 0.0) for a in drawn])
    gradient = [entropy_coef * p * (log_p + entropy) for p, log_p in zip(probs, log_probs, strict=True)]
    for a, advantage in zip(drawn, advantages, strict=True):
        for token, p in enumerate(probs):
            gradient[token] -= advantage * ((token == a) - p) / len(drawn)
    loss = -sum(advantages) / len(drawn) - entropy_coef * entropy
    return _result(loss, [g / temperature for g in gradient])


def ppo(
    player,
    critics,
    target,
    uniforms,
    snapshot,
    *,
    clip=0.2,
    entropy_coef=0.01,
    temperature=1.0,
    per_action_mean=False,
    **settings,
) -> dict:
    """−(1/S) Σ min(ρ A, clip(ρ) A) − β H(π), actions drawn from ``snapshot``, ρ the ratio to it."""
    rewards = _rewards_by_token(player, critics, target, per_action_mean, settings)
    log_probs, probs, entropy = _policy(player, temperature)
    _, old_probs, _ = _policy(snapshot, temperature)
    drawn = [draw(old_probs, u) for u in uniforms]
    advantages = _advantages([rewards.get(a, 0.0) for a in drawn])
    loss = -entropy_coef * entropy
    gradient = [entropy_coef * p * (log_p + entropy) for p, log_p in zip(probs, log_probs, strict=True)]
    for a, advantage in zip(drawn, advantages, strict=True):
        ratio = probs[a] / old_probs[a]
        clipped = min(max(ratio, 1 - clip), 1 + clip)
        loss -= min(ratio * advantage, clipped * advantage) / len(drawn)
        if ratio * advantage <= clipped * advantage:
            for token, p in enumerate(probs):
                gradient[token] -= ratio * advantage * ((token == a) - p) / len(drawn)
    return _result(loss, [g / temperature for g in gradient])


def cross_entropy(player, target) -> dict:
    """−log π(target)."""
    log_probs, probs, _ = _policy(player, 1.0)
    return _result(-log_probs[target], [p - (a == target) for a, p in enumerate(probs)])


def label_smoothing(player, target, *, smoothing=0.1) -> dict:
    """−Σ t log π with t = (1−ε)·onehot + ε/V."""
    log_probs, probs, _ = _policy(player, 1.0)
    soft = [(1 - smoothing) * (a == target) + smoothing / len(player) for a in range(len(player))]
    loss = -sum(t * log_p for t, log_p in zip(soft, log_probs, strict=True))
    return _result(loss, [p - t for p, t in zip(probs, soft, strict=True)])


def distillation(player, critics, target, *, alpha=0.5) -> dict:
    """α·(−log π(target)) + (1−α)·KL(critic‖player), several critics averaged."""
    log_probs, probs, _ = _policy(player, 1.0)
    loss, gradient = -alpha * log_probs[target], [p - alpha * (a == target) for a, p in enumerate(probs)]
    for critic in critics:
        share = (1 - alpha) / len(critics)
        for a, (log_q, log_p) in enumerate(zip(log_softmax(critic), log_probs, strict=True)):
            q = math.exp(log_q)
            loss += share * q * (log_q - log_p)
            gradient[a] -= share * q
    return _result(loss, gradient)
