"""Random inputs, settings and the rule's answers over them, that the tests of the objectives share."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from avatarl import AvataRLConfig, avatarl_loss
from avatarl.objective import CachedAnswers, LiveAnswers, Objective, engine, rule

# --- logits ----------------------------------------------------------------------------------------------------------

LINEAR = AvataRLConfig(top_k=3, pool="arithmetic", threshold="none")
CONFIGS = {
    "article": AvataRLConfig.article(top_k=4),
    "released": AvataRLConfig.released(),
    "dense": AvataRLConfig.dense(top_k=4),
    "no threshold": AvataRLConfig.article(top_k=5, threshold="none", reward_cap=None),
    "no smoothing": AvataRLConfig.article(top_k=4, smoothing=0.0),
    "no bonus": AvataRLConfig.article(top_k=3, entropy_coef=0.0),
    "one proposal": AvataRLConfig.article(top_k=1),
    "top-p": AvataRLConfig.article(top_k=8, top_p=0.7),
    "tight top-p": AvataRLConfig.article(top_k=8, top_p=0.05),
    "per action": AvataRLConfig.article(top_k=4, per_action_mean=True, threshold="none"),
    "hot": AvataRLConfig.article(top_k=4, temperature=1.7, entropy_coef=0.3),
    "critic alone": AvataRLConfig.article(top_k=6, reality_weight=0.0, critic_weight=1.0),
    "text alone": AvataRLConfig.article(top_k=6, critic_weight=0.0),
    "critics propose alone": AvataRLConfig.article(top_k=4, player_proposes=False, threshold="none"),
    "critics propose alone, top-p": AvataRLConfig.article(top_k=8, top_p=0.7, player_proposes=False),
    "low scale": AvataRLConfig.article(top_k=4, reward_scale=2.0, reward_cap=1.9),
    "geometric, target": AvataRLConfig(top_k=3, tail="target", threshold="none"),
    "arithmetic, renormalise": AvataRLConfig(top_k=3, pool="arithmetic", tail="renormalise"),
    "arithmetic, target": AvataRLConfig(top_k=4, pool="arithmetic"),
    "arithmetic, top-p": AvataRLConfig.article(top_k=4, pool="arithmetic", threshold="none", top_p=0.8),
    "arithmetic, mostly critic": AvataRLConfig.article(pool="arithmetic", reality_weight=0.1, critic_weight=0.9),
    "dense, cap": dataclasses.replace(LINEAR, tail="dense"),
    "dense, top-p": dataclasses.replace(LINEAR, tail="dense", top_p=0.6),
    "dense, no cap": dataclasses.replace(LINEAR, tail="dense", reward_cap=None, reward_scale=2.0),
    "dense, hot": dataclasses.replace(LINEAR, tail="dense", temperature=1.3, smoothing=0.0),
}


def random_inputs(positions=24, vocabulary=29, critics=1, seed=0, dtype=torch.float64, spread=3.0):
    """Player logits (N, V) that require grad, a list of critic logits (N, V), targets (N,)."""
    generator = torch.Generator().manual_seed(seed)

    def logits():
        return (torch.randn(positions, vocabulary, generator=generator, dtype=torch.float64) * spread).to(dtype)

    targets = torch.randint(vocabulary, (positions,), generator=generator)
    return logits().requires_grad_(), [logits() for _ in range(critics)], targets


def random_config(seed: int, critics: int) -> AvataRLConfig:
    """Any settings that fit each other, for so many critics."""
    choose = random.Random(seed)
    pool = choose.choice(["geometric", "arithmetic"])
    tail = choose.choice(["renormalise", "target", *(["dense"] if pool == "arithmetic" else [])])
    threshold = choose.choice(
        ["mean", "none"] if pool == "arithmetic" or tail == "target" else ["mean", "mass", "none"]
    )
    weights = [choose.choice([0.0, choose.random()]) for _ in range(1 + critics)]
    total = sum(weights) or 1.0
    reality, *of_critics = [weight / total for weight in weights] if sum(weights) else [1.0, *weights[1:]]
    return AvataRLConfig(
        top_k=choose.choice([1, 2, 3, 7, 29]),
        top_p=choose.choice([None, 1.0, choose.uniform(0.01, 0.99)]),
        smoothing=choose.choice([0.0, choose.uniform(0, 0.9)]),
        pool=pool,
        tail=tail,
        threshold="none" if tail == "dense" else threshold,
        reality_weight=reality if critics else 1.0,
        critic_weight=tuple(of_critics) if critics else 0.0,
        reward_scale=choose.choice([1.0, 3.0, 100.0]),
        reward_cap=choose.choice([None, 0.3, 1.5]),
        entropy_coef=choose.choice([0.0, 0.01, 0.5]),
        temperature=choose.choice([1.0, 0.7, 1.4]),
        per_action_mean=tail != "dense" and choose.random() < 0.3,
        player_proposes=choose.random() < 0.7,
    )


def extras(objective: Objective, player: Tensor, seed: int = 5) -> dict[str, Tensor]:
    """The uniforms (N, S) and the snapshot's logits (N, V) that an objective needs."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    if objective.num_uniforms:
        found["uniforms"] = torch.rand(len(player), objective.num_uniforms, generator=generator, dtype=torch.float64)
    if objective.needs_snapshot:
        noise = torch.randn(player.shape, generator=generator, dtype=torch.float64).to(player.dtype)
        found["snapshot_logits"] = player.detach() + (2 * noise).round() / 8
    return found


def expected_by_rule(
    objective: Objective, player: Tensor, critics: Sequence[Tensor], targets: Tensor, extra: dict | None = None, **how
) -> tuple[Tensor, Tensor]:
    """The rule's loss and, by autograd, its gradient (N, V)."""
    extra, drawn = extra or {}, None
    snapshot = extra.get("snapshot_logits")
    if objective.kind.is_sampled:
        behaviour = (player if snapshot is None else snapshot) / objective.avatarl.temperature
        reached = behaviour.softmax(1).cumsum(1).unsqueeze(1)  # (N, 1, V)
        uniforms = extra["uniforms"][:, : objective.baseline.samples].unsqueeze(2)
        drawn = (reached <= uniforms).sum(2).clamp(max=player.shape[1] - 1)
    z = player.detach().clone().requires_grad_()
    loss = rule.loss(
        objective.name,
        z,
        critics,
        targets,
        objective.avatarl,
        objective.baseline,
        drawn=drawn,
        snapshot=snapshot,
        **how,
    )
    return loss.detach(), torch.autograd.grad(loss, z)[0]


def cached(
    logits: Tensor,
    targets: Tensor,
    top: int,
    draws: int = 0,
    uniforms: Tensor | None = None,
    log_frequencies: Tensor | None = None,
) -> CachedAnswers:
    """What a cache would hold of a critic, without rounding, in a text where all tokens are as frequent."""
    critic = LiveAnswers(logits)
    tokens = torch.cat([targets.unsqueeze(1), logits.topk(top, dim=1).indices], dim=1)
    log_probs, _ = critic.log_probs_at(tokens, logits.dtype)
    is_new = torch.cat([torch.ones_like(tokens[:, :1], dtype=torch.bool), tokens[:, 1:] != tokens[:, :1]], dim=1)
    log_rest = critic.log_outside(tokens, is_new, log_probs).squeeze(1)
    drawn = critic.sample_outside(tokens, is_new, draws, uniforms)[0] if draws else tokens[:, :0]
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    if log_frequencies is None:
        log_frequencies = torch.full(logits.shape[1:], -math.log(logits.shape[1]), dtype=logits.dtype)
    return CachedAnswers(tokens, log_probs, log_rest, drawn, entropy, log_frequencies)


# --- hidden states and heads -----------------------------------------------------------------------------------------

POSITIONS, VOCABULARY, WIDTH, CRITIC_WIDTH = 23, 31, 7, 5
CONFIG = AvataRLConfig.article(top_k=4, threshold="none")


def random_heads(positions=POSITIONS, vocabulary=VOCABULARY, critics=1, dtype=torch.float64, seed=0):
    """hidden (N, d) and head weight (V, d) that require grad; lists of the critics' of other widths; targets (N,)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, weight = normal(positions, WIDTH).requires_grad_(), normal(vocabulary, WIDTH).requires_grad_()
    widths = [CRITIC_WIDTH + i for i in range(critics)]
    critic_hidden = [normal(positions, width) for width in widths]
    critic_weight = [normal(vocabulary, width) for width in widths]
    return hidden, weight, critic_hidden, critic_weight, torch.randint(vocabulary, (positions,), generator=generator)


def materialised(hidden, weight, critic_hidden, critic_weight, targets, config=CONFIG, **kwargs):
    critics = [states @ head.t() for states, head in zip(critic_hidden, critic_weight, strict=True)]
    return avatarl_loss(hidden @ weight.t(), critics, targets, config, **kwargs)


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


def small_chunks(monkeypatch, elements):
    monkeypatch.setitem(engine.CHUNK_ELEMENTS, "cpu", elements)


def assert_same(found, expected, rel=1e-12):
    """Two (loss, metrics) pairs."""
    assert found[0].item() == pytest.approx(expected[0].item(), rel=rel)
    assert set(found[1]) == set(expected[1])
    for name, value in expected[1].items():
        assert found[1][name].item() == pytest.approx(value.item(), rel=rel, abs=1e-14), name


def errors(found, exact):
    """Relative error of each gradient, ‖found − exact‖ / ‖exact‖."""
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]
