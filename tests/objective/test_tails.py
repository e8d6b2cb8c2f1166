"""What becomes of a critic's probability outside of the active actions; test_paths.py holds each rule to the method."""

import dataclasses

import pytest
import torch

from avatarl import AvataRLConfig, avatarl_loss, linear_avatarl_loss, reward_landscape
from avatarl.objective import BaselineConfig, LiveAnswers, engine, make_objective, objective_loss, rule

from .cases import LINEAR, random_inputs

RULES = {
    "geometric, renormalise": AvataRLConfig(top_k=3),
    "geometric, target": AvataRLConfig(top_k=3, tail="target", threshold="none"),
    "arithmetic, renormalise": AvataRLConfig(top_k=3, pool="arithmetic", tail="renormalise"),
    "arithmetic, target": AvataRLConfig(top_k=3, pool="arithmetic"),
    "arithmetic, sample": dataclasses.replace(LINEAR, tail="sample", tail_samples=5),
    "arithmetic, dense": dataclasses.replace(LINEAR, tail="dense"),
    "sample, top_p": dataclasses.replace(LINEAR, tail="sample", tail_samples=5, top_p=0.6),
    "dense, top_p": dataclasses.replace(LINEAR, tail="dense", top_p=0.6),
    "dense without a cap": dataclasses.replace(LINEAR, tail="dense", reward_cap=None, reward_scale=2.0),
    "dense, tempered": dataclasses.replace(LINEAR, tail="dense", temperature=1.3, smoothing=0.0),
}


def draws(positions: int, seed: int = 5) -> torch.Tensor:
    return torch.rand(positions, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("samples", [1, 5])
def test_systematic_draws_by_counting(samples):
    """The token at each of the points (u + i) / S of the distribution outside of the actions, and its equal share."""
    _, (logits,), targets = random_inputs(spread=1.5)
    actions = torch.stack([targets, (targets + 1) % 29, targets], dim=1)  # the last repeats the first
    valid, uniforms = torch.tensor([[True, True, False]]).expand(24, 3), draws(24)
    tokens, mass = LiveAnswers(logits).sample_outside(actions, valid, samples, uniforms)
    outside = logits.softmax(1).scatter(1, actions, 0.0)
    rest = outside.sum(1)
    torch.testing.assert_close(mass, (rest / samples).unsqueeze(1).expand(24, samples))
    for row, point in enumerate(uniforms[:, 0].tolist()):
        reached = (outside[row].cumsum(0) / rest[row]).tolist()
        points = [(point + i) / samples for i in range(samples)]
        assert tokens[row].tolist() == [next(t for t, total in enumerate(reached) if total > at) for at in points]


def test_sampled_tokens_are_columns_of_their_own():
    """Each once, with the critic's mass and none of the text's."""
    config = dataclasses.replace(LINEAR, tail="sample", tail_samples=5)
    player, (critic,), targets = random_inputs()
    landscape = reward_landscape(player, critic, targets, config, uniforms=draws(len(targets)))
    torch.testing.assert_close(landscape.consensus.sum(1), torch.ones(24, dtype=torch.float64))
    assert not landscape.tail_mass.any() and not landscape.reality[:, 7:].any() and landscape.consensus[:, 7:].any()
    ids = [row[kept].tolist() for row, kept in zip(landscape.actions, landscape.valid, strict=True)]
    assert all(len(set(row)) == len(row) for row in ids)


def test_the_best_possible_is_that_of_all_tokens():
    """Two critics agree on their second choice, which neither proposes: a policy that plays it expects the most."""
    critics = [torch.tensor([[3.0, -9.0, 2.9, -9.0]]), torch.tensor([[-9.0, 3.0, 2.9, -9.0]])]
    player, targets = torch.tensor([[-9.0, -9.0, 12.0, 0.0]]), torch.tensor([3])
    config = AvataRLConfig.dense(top_k=1, player_proposes=False)
    _, metrics = avatarl_loss(player, critics, targets, config)
    assert metrics["expected_reward_share"].item() == pytest.approx(1, abs=1e-4)
    assert metrics["expected_reward_share"] <= 1
    rewards = sum(0.4 * critic.softmax(-1) for critic in critics)
    rewards[0, 3] += 0.2
    assert metrics["expected_reward"].item() == pytest.approx((player.softmax(-1) * rewards).sum().item(), rel=1e-5)
    share = metrics["expected_reward"].item() / rewards.max().item()
    assert metrics["expected_reward_share"].item() == pytest.approx(share, rel=1e-5)


def test_sample_without_draws_takes_torchs_own():
    config = dataclasses.replace(LINEAR, tail="sample")
    player, (critic,), targets = random_inputs()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(avatarl_loss(player, critic, targets, config)[0].item())
    assert losses[0] == losses[1] != losses[2]


def test_dense_without_cap_and_bonus_is_distillation():
    """w_R · cross-entropy + w_C · KL has the gradient of a linear mixture of text and critic."""
    config = dataclasses.replace(
        LINEAR, tail="dense", reward_scale=1.0, reward_cap=None, smoothing=0.0, entropy_coef=0.0
    )
    player, (critic,), targets = random_inputs()
    (found,) = torch.autograd.grad(avatarl_loss(player, critic, targets, config)[0], player)
    distillation = make_objective("distillation", baseline=BaselineConfig(distillation_alpha=0.7))
    (expected,) = torch.autograd.grad(objective_loss(distillation, player, critic, targets)[0], player)
    torch.testing.assert_close(found, expected)


def test_a_complete_active_set_leaves_no_tail():
    player, (critic,), targets = random_inputs(vocabulary=11)
    losses = {
        tail: avatarl_loss(player, critic, targets, dataclasses.replace(LINEAR, top_k=11, tail=tail))[0].item()
        for tail in ("renormalise", "target", "sample", "dense")
    }
    assert all(loss == pytest.approx(losses["dense"], rel=1e-9) for loss in losses.values())


@pytest.mark.parametrize("rule", RULES)
def test_an_offset_that_all_logits_share_changes_nothing(rule):
    """In float32 and in eighths, which are exact at a million."""
    player, critics, targets = random_inputs(critics=2, dtype=torch.float32)
    found = []
    for offset in (0.0, 2.0**20):
        z, *judges = ((logits.detach() * 8).round() / 8 + offset for logits in (player, *critics))
        loss, metrics = avatarl_loss(z.requires_grad_(), judges, targets, RULES[rule], uniforms=draws(24))
        found.append((loss, metrics, torch.autograd.grad(loss, z)[0]))
    (loss, metrics, gradient), (moved, moved_metrics, moved_gradient) = found
    assert moved.item() == pytest.approx(loss.item(), rel=1e-5)
    assert {key: value.item() for key, value in moved_metrics.items()} == pytest.approx(
        {key: value.item() for key, value in metrics.items()}, rel=1e-5
    )
    assert (moved_gradient - gradient).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [rule for rule in RULES if "sample" in rule or "dense" in rule])
def test_the_fused_path(rule, dtype, monkeypatch):
    """In ragged chunks, judged by the excess of its error over that of the plain path in the same precision."""
    monkeypatch.setitem(engine.CHUNK_ROWS, "cpu", 8)
    config, generator = RULES[rule], torch.Generator().manual_seed(3)
    hidden, critic_hidden = (torch.randn(23, 16, generator=generator) for _ in range(2))
    head, critic_head = (torch.randn(31, 16, generator=generator) for _ in range(2))
    targets = torch.randint(29, (23,), generator=generator)
    targets[4] = -100
    uniforms = torch.rand(23, 1, generator=generator)
    found = {}
    for name, kind in (("exact", torch.float64), ("plain", dtype), ("fused", dtype)):
        inputs = [x.to(dtype).to(kind) for x in (hidden, head, critic_hidden, critic_head)]
        inputs[0].requires_grad_(), inputs[1].requires_grad_()
        if name == "fused":
            loss, _ = linear_avatarl_loss(*inputs, targets, config, vocab_size=29, uniforms=uniforms)
        else:
            logits = inputs[0] @ inputs[1].t(), inputs[2] @ inputs[3].t()
            loss, _ = avatarl_loss(*logits, targets, config, vocab_size=29, uniforms=uniforms)
        found[name] = [loss.detach(), *torch.autograd.grad(loss, inputs[:2])]
    errors = {
        name: [(x.double() - y).norm() / y.norm() for x, y in zip(found[name], found["exact"], strict=True)]
        for name in ("plain", "fused")
    }
    for plain, fused in zip(errors["plain"], errors["fused"], strict=True):
        assert fused <= 1.5 * plain + 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("gap", [8.0, 14.0, 18.0])
def test_a_target_that_a_sure_critic_finds_unlikely_keeps_what_it_has(gap):
    """In float32, where one minus the others' probabilities would be nothing but rounding."""
    critic = -25 - torch.arange(64, dtype=torch.float64).unsqueeze(0) / 16  # no ties
    critic[0, 0], critic[0, 5] = 0.0, -gap
    player, targets = torch.arange(64, dtype=torch.float64).unsqueeze(0) / 16, torch.tensor([5])
    config = AvataRLConfig(top_k=4, tail="target", threshold="none")
    exact, single = (
        reward_landscape(player.to(d), critic.to(d), targets, config) for d in (torch.float64, torch.float32)
    )
    assert single.consensus[0, 0].item() == pytest.approx(exact.consensus[0, 0].item(), rel=1e-4)
    expected = rule.landscape(player, [critic], targets, config)
    assert exact.consensus[0, 0].item() == pytest.approx(expected.consensus[0, 5].item(), rel=1e-6)


def test_an_impossible_token_is_never_drawn():
    """At the largest number below 1, where a product rounds up to the whole distribution."""
    player, (critic,), targets = random_inputs(dtype=torch.float32)
    critic[:, -1] = -200.0
    config = dataclasses.replace(LINEAR, tail="sample", tail_samples=64)
    uniforms = torch.full((24, 1), 1 - 2**-24)
    landscape = reward_landscape(player, critic, targets, config, uniforms=uniforms)
    drawn = landscape.actions[:, 1 + 2 * config.top_k :][landscape.valid[:, 1 + 2 * config.top_k :]]
    assert len(drawn) and (drawn != critic.shape[1] - 1).all()


@pytest.mark.parametrize("tail", ["target", "dense", "sample"])
def test_a_critic_in_another_precision(tail):
    generator = torch.Generator().manual_seed(3)
    wide, narrow = (torch.randn(7, 16, generator=generator) for _ in range(2))
    head, critic_head = (torch.randn(31, 16, generator=generator) for _ in range(2))
    config, targets = dataclasses.replace(LINEAR, tail=tail), torch.arange(7)
    uniforms = torch.full((7, 1), 0.5)
    losses = [
        linear_avatarl_loss(
            wide.to(a), head.to(a), narrow.to(b), critic_head.to(b), targets, config, uniforms=uniforms
        )[0]
        for a, b in ((torch.float64, torch.float32), (torch.float32, torch.float64), (torch.float64, torch.float64))
    ]
    assert [loss.item() for loss in losses] == pytest.approx([losses[2].item()] * 3, rel=1e-5)


@pytest.mark.parametrize("name", ["expected_reward", "reinforce", "ppo"])
def test_objectives_that_do_not_pay_every_token_say_so(name):
    player, critics, targets = random_inputs()
    objective = make_objective(name, dataclasses.replace(LINEAR, tail="dense"), BaselineConfig(samples=2))
    with pytest.raises(ValueError, match=f"tail='dense' rewards every token, which '{name}' does not"):
        objective_loss(objective, player, critics, targets, snapshot_logits=player.detach())


@pytest.mark.parametrize("name", ["expected_reward", "reinforce"])
def test_sampled_actions_are_paid_by_the_other_objectives_too(name):
    player, critics, targets = random_inputs()
    objective = make_objective(name, dataclasses.replace(LINEAR, tail="sample"), BaselineConfig(samples=4))
    losses = []
    for point in (0.1, 0.9):
        uniforms = torch.full((24, objective.num_uniforms), 0.4, dtype=torch.float64)
        uniforms[:, -1] = point
        losses.append(objective_loss(objective, player, critics, targets, uniforms=uniforms)[1]["expected_reward"])
    assert losses[0] != losses[1]
