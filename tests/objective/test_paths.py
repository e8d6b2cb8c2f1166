"""Every faster path against the rule, in float64: loss, gradient and metrics, under any settings."""

import dataclasses
import shutil

import pytest
import torch
from torch import Tensor

from avatarl import AvataRLConfig, reward_landscape
from avatarl.objective import (
    OBJECTIVES,
    BaselineConfig,
    engine,
    linear_objective_loss,
    make_objective,
    objective_loss,
    rule,
)

from .cases import CONFIGS, cached, expected_by_rule, extras, random_config, random_inputs

BASELINE = BaselineConfig(label_smoothing=0.2, distillation_alpha=0.3, samples=5, ppo_clip=0.1)
SAMPLED = {
    "sample": dataclasses.replace(CONFIGS["dense, cap"], tail="sample", tail_samples=5),
    "sample, top-p": dataclasses.replace(CONFIGS["dense, top-p"], tail="sample", tail_samples=3),
    "sample, no cap": dataclasses.replace(CONFIGS["dense, no cap"], tail="sample", tail_samples=2),
}


def from_logits(objective, player, critics, targets, extra):
    return objective_loss(objective, player, critics, targets, **extra)


def from_hidden(objective, player, critics, targets, extra, impl="chunked", **how):
    """The logits are the hidden states and every head is the identity: the gradient is that over the logits."""
    head, extra = torch.eye(player.shape[1], dtype=player.dtype), dict(extra)
    if "snapshot_logits" in extra:
        extra["snapshot"] = extra.pop("snapshot_logits"), head
    heads = [head if isinstance(critic, Tensor) else None for critic in critics]
    return linear_objective_loss(objective, player, head, critics, heads, targets, impl=impl, **extra, **how)


def from_graph(*arguments):
    torch._dynamo.reset()
    return torch.compile(from_hidden, fullgraph=True, backend="eager")(*arguments)


def from_caches(objective, player, critics, targets, extra):
    """All of the critics' distributions in store: exact."""
    counted = targets.clamp(min=0)
    return from_hidden(objective, player, [cached(c, counted, c.shape[1]) for c in critics], targets, extra)


def compiled(*arguments):
    return from_hidden(*arguments, impl="compiled")


PATHS = {"logits": from_logits, "hidden": from_hidden, "caches": from_caches, "graph": from_graph, "compiled": compiled}
compiles_cpp = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
FAST, ALL = (
    ("logits", "hidden", "caches"),
    [
        *("logits", "hidden", "caches", "graph"),
        pytest.param("compiled", marks=[pytest.mark.slow, compiles_cpp]),
    ],
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setitem(engine.CHUNK_ROWS, "cpu", 7)  # 6, 6, 6, 6 of 24 positions, 6, 6, 5 of 17


def assert_follows_the_rule(path: str, objective, player, critics, targets):
    extra = extras(objective, player)
    expected, expected_gradient = expected_by_rule(objective, player, critics, targets, extra)
    loss, metrics = PATHS[path](objective, player, critics, targets, extra)
    (gradient,) = torch.autograd.grad(loss, player)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-11)
    assert metrics["loss"].item() == loss.item()
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-11)
    counted = targets >= 0
    z, judges, at = player[counted].detach(), [critic[counted] for critic in critics], targets[counted].unsqueeze(1)
    wanted = {
        "cross_entropy": -z.log_softmax(1).gather(1, at).mean(),
        "entropy": torch.distributions.Categorical(logits=z).entropy().mean(),
    }
    if objective.kind.is_rewarded:
        found = rule.landscape(z, judges, at[:, 0], objective.avatarl)
        rewards, earned = found.rewards, (found.rewards * z.softmax(1)).sum(1)
        share = torch.where(rewards.amax(1) > 0, earned / rewards.amax(1), 0)
        others = 1 - rewards.gather(1, at)[:, 0] / rewards.sum(1)
        wanted |= {"expected_reward": earned.mean(), "active_actions": found.active.double().sum(1).mean()}
        wanted |= {"expected_reward_share": share.mean(), "other_reward_share": others.mean()}
        if judges:
            favourites = torch.stack([critic.argmax(1) for critic in judges], 1)
            wins = rewards.gather(1, favourites) > rewards.gather(1, at)
            wanted["critic_wins"] = wins.double().mean()
    for name, value in wanted.items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-8, abs=1e-10), name


@pytest.mark.parametrize("path", ALL)
@pytest.mark.parametrize("name", CONFIGS)
def test_named_settings(name, path):
    config = CONFIGS[name]
    if path == "caches" and "dense" in name:
        pytest.skip("a cache does not hold the whole distribution's tail")
    for seed, spread in enumerate((0.5, 3.0, 9.0) if path in FAST else (3.0,)):
        player, critics, targets = random_inputs(seed=seed, spread=spread)
        targets[3] = -100
        assert_follows_the_rule(path, make_objective("avatarl", config), player, critics, targets)


@pytest.mark.parametrize("seed", range(60))
def test_any_settings(seed):
    """Of every objective, under no, one or several critics, of ragged numbers of positions."""
    critics = (1, 2, 3, 0)[seed % 4]
    config = random_config(seed, critics)
    player, judges, targets = random_inputs(positions=17, critics=critics, seed=seed, spread=(0.5, 2.0, 5.0)[seed % 3])
    targets[:: 5 + seed % 3] = -100
    for name, kind in OBJECTIVES.items():
        if config.tail == "dense" and kind.is_rewarded and name != "avatarl" or name == "distillation" and not critics:
            continue
        for path in ("logits", "hidden") if config.tail == "dense" else FAST:
            assert_follows_the_rule(path, make_objective(name, config, BASELINE), player, judges, targets)


@pytest.mark.parametrize("path", ALL)
@pytest.mark.parametrize("config", ["article", "per action", "hot"])
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_objective(name, config, path):
    player, critics, targets = random_inputs(critics=2)
    targets[5:9] = -100
    assert_follows_the_rule(path, make_objective(name, CONFIGS[config], BASELINE), player, critics, targets)


@pytest.mark.parametrize("critics", [1, 2])
@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_tails_follow_the_rule_in_expectation(name, samples, critics):
    """Systematic draws over a fine grid of their one number are a grid over the distribution: the mean is exact to the
    grid's width."""
    objective = make_objective("avatarl", dataclasses.replace(SAMPLED[name], tail_samples=samples))
    player, judges, targets = random_inputs(critics=critics, positions=8, spread=1.5)
    loss, expected = expected_by_rule(objective, player, judges, targets)
    total, mean, single, count = torch.zeros_like(player), 0.0, [], 400
    for i in range(count):
        uniforms = torch.full((8, 1), (i + 0.5) / count, dtype=torch.float64)
        found, _ = from_hidden(objective, player, judges, targets, {"uniforms": uniforms})
        (gradient,) = torch.autograd.grad(found, player)
        total, mean = total + gradient / count, mean + found.item() / count
        single.append((gradient - expected).abs().max().item())
    assert mean == pytest.approx(loss.item(), rel=3e-3)
    assert max(single) > 0.02 * expected.abs().max()  # no single draw has it
    assert (total - expected).abs().max() < 0.05 * max(single)


@pytest.mark.parametrize("settings", [AvataRLConfig.article(), AvataRLConfig.article(threshold="none", top_k=64)])
def test_gpt2s_vocabulary(settings):
    """50,257 tokens, where the most likely are found by blocks."""
    player, critics, targets = random_inputs(positions=3, vocabulary=50_257)
    objective = make_objective("avatarl", settings)
    expected, gradient = expected_by_rule(objective, player, critics, targets)
    loss, _ = from_logits(objective, player, critics, targets, {})
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, player)[0], gradient, atol=1e-14, rtol=1e-10)


@pytest.mark.parametrize("critics", [0, 1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_landscape(name, critics):
    """Columns of actions, each token once, hold what the rule has at these tokens; the tail has the rest."""
    config = CONFIGS[name]
    if critics == 0:
        config = dataclasses.replace(config, reality_weight=1.0, critic_weight=0.0)
    player, judges, targets = random_inputs(critics=critics, seed=critics)
    found, expected = reward_landscape(player, judges, targets, config), rule.landscape(player, judges, targets, config)
    assert found.actions.dtype == torch.int64 and torch.equal(found.actions[:, 0], targets) and found.valid[:, 0].all()
    assert torch.equal(found.valid.sum(1), expected.active.sum(1))
    assert expected.active.gather(1, found.actions)[found.valid].all()
    for field in ("reality", "consensus", "rewards"):
        wanted = getattr(expected, field).gather(1, found.actions).masked_fill(~found.valid, 0)
        torch.testing.assert_close(getattr(found, field), wanted, rtol=1e-9, atol=1e-12)
    outside = (expected.consensus * ~expected.active).sum(1)
    torch.testing.assert_close(found.tail_mass, outside, rtol=1e-9, atol=1e-12)
    assert (outside.max() > 0.001) == (config.tail == "dense" and critics > 0)
    assert (found.critic is None) == (critics == 0)
    for critic, probs in zip(judges, [] if found.critic is None else found.critic, strict=True):
        wanted = critic.softmax(1).gather(1, found.actions).masked_fill(~found.valid, 0)
        torch.testing.assert_close(probs, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["article", "arithmetic, target", "geometric, target", "dense, cap", "released"])
def test_second_look_by_finite_differences(name):
    """The closed form is the loss's derivative, rewards held still."""
    player, critics, targets = random_inputs(positions=5, vocabulary=9)
    config = dataclasses.replace(CONFIGS[name], top_k=2)
    for path in ("logits", "hidden"):
        objective = make_objective("avatarl", config)
        assert torch.autograd.gradcheck(
            lambda z, path=path, objective=objective: PATHS[path](objective, z, critics, targets, {})[0], (player,)
        )
