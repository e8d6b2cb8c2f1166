"""The rule by hand: worked numbers, the released function's figures, and the facts that docs/method.md states."""

import ast
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from avatarl import AvataRLConfig
from avatarl.objective import BaselineConfig, rule


def logs(*probs: float) -> Tensor:
    """Logits (1, V) of these probabilities."""
    return torch.tensor([probs], dtype=torch.float64).log()


# Four tokens, the target 0; the player proposes 0 and 1, the critic 1 and 2.
PLAYER, CRITIC, TARGET = logs(0.5, 0.3, 0.15, 0.05), logs(0.2, 0.5, 0.25, 0.05), torch.tensor([0])
EVEN = dict(top_k=2, smoothing=0.2, reality_weight=0.5, critic_weight=0.5, threshold="none", reward_scale=10.0)
ARITHMETIC = dict(EVEN, pool="arithmetic", reward_cap=None)


@pytest.mark.parametrize(
    "settings, rewards",
    [
        # p_R = 0.8, 0.1, 0.1 and p_C = 0.2, 0.5, 0.25 on the actions 0, 1, 2; 0.05 lies outside.
        (
            dict(ARITHMETIC, tail="renormalise"),
            [10 * (0.4 + 0.1 / 0.95), 10 * (0.05 + 0.25 / 0.95), 10 * (0.05 + 0.125 / 0.95), 0],
        ),
        (dict(ARITHMETIC, tail="target"), [10 * (0.4 + 0.125), 3.0, 1.75, 0]),
        (dict(ARITHMETIC, tail="dense"), [5.0, 3.0, 1.75, 0.25]),
        (dict(ARITHMETIC, tail="sample"), [5.0, 3.0, 1.75, 0.25]),  # in expectation
        (dict(ARITHMETIC, tail="dense", reward_cap=2.5), [2.5, 1.5, 0.875, 0.125]),
        (dict(ARITHMETIC, tail="target", threshold="mean"), [5.25, 0, 0, 0]),  # above 1/3
        (dict(ARITHMETIC, tail="target", top_p=0.4), [10 * (0.4 + 0.25), 10 * (0.1 + 0.25), 0, 0]),  # 0 | 1: n = 2
        (
            dict(ARITHMETIC, tail="dense", player_proposes=False, top_k=1),
            [10 * (0.4 + 0.1), 10 * (0.1 + 0.25), 1.25, 0.25],
        ),
        # √(p_R p_C) = 0.4, 0.223607, 0.158114: their sum is 0.781721.
        (dict(EVEN, reward_cap=None), [5.116917, 2.860442, 2.022641, 0]),
        (dict(EVEN, reward_cap=1.5), [1.5, 0.838525, 0.592927, 0]),
        (dict(EVEN, reward_cap=None, threshold="mass"), [5.116917, 2.860442, 0, 0]),  # above 0.260574
        (dict(EVEN, reward_cap=None, threshold="mean"), [5.116917, 0, 0, 0]),
        # √(0.8 · 0.25), with the mass outside on the target: 0.447214, 0.223607, 0.158114.
        (dict(EVEN, reward_cap=None, tail="target"), [5.395043, 2.697521, 1.907436, 0]),
    ],
)
def test_rewards_by_hand(settings: dict, rewards: list[float]):
    found = rule.landscape(PLAYER, [CRITIC], TARGET, AvataRLConfig(**settings))
    assert found.rewards[0].tolist() == pytest.approx(rewards, abs=2e-6)
    assert found.reality[0].sum() == pytest.approx(1)


def test_two_critics_by_hand():
    """Weights 0.2, 0.3 and 0.5 of p = (0.2, 0.5, 0.25, 0.05) and q = (0.1, 0.1, 0.1, 0.7); all four are active."""
    config = AvataRLConfig(**dict(ARITHMETIC, tail="dense", reality_weight=0.2, critic_weight=(0.3, 0.5)))
    found = rule.landscape(PLAYER, [CRITIC, logs(0.1, 0.1, 0.1, 0.7)], TARGET, config)
    assert found.active.all()
    expected = [0.2 * 0.8 + 0.06 + 0.05, 0.2 / 15 + 0.15 + 0.05, 0.2 / 15 + 0.075 + 0.05, 0.2 / 15 + 0.015 + 0.35]
    assert found.consensus[0].tolist() == pytest.approx(expected)


def test_losses_by_hand():
    config = AvataRLConfig(**dict(ARITHMETIC, tail="target", entropy_coef=0.1))
    pi, rewards = [0.5, 0.3, 0.15, 0.05], [5.25, 3.0, 1.75, 0.0]
    entropy = -sum(p * math.log(p) for p in pi)
    found = {
        name: rule.loss(name, PLAYER, [CRITIC], TARGET, config, BaselineConfig(distillation_alpha=0.25)).item()
        for name in ("avatarl", "expected_reward", "cross_entropy", "label_smoothing", "distillation")
    }
    divergence = sum(q * math.log(q / p) for q, p in zip([0.2, 0.5, 0.25, 0.05], pi, strict=True))
    assert found == pytest.approx(
        {
            "avatarl": -sum(r * math.log(p) for r, p in zip(rewards, pi, strict=True)) - 0.1 * entropy,
            "expected_reward": -sum(r * p for r, p in zip(rewards, pi, strict=True)) - 0.1 * entropy,
            "cross_entropy": math.log(2),
            "label_smoothing": 0.9 * math.log(2) - 0.1 * sum(map(math.log, pi)) / 4,
            "distillation": 0.25 * math.log(2) + 0.75 * divergence,
        }
    )


def test_sampled_losses_by_hand():
    """Actions 1 and 0 earn 3 and 5.25: advantages −2.25 and 2.25. The snapshot found them half and twice as likely."""
    config = AvataRLConfig(**dict(ARITHMETIC, tail="target", entropy_coef=0.0))
    drawn, snapshot = torch.tensor([[1, 0]]), logs(0.25, 0.6, 0.1, 0.05)
    z = PLAYER.clone().requires_grad_()
    loss = rule.loss("reinforce", z, [CRITIC], TARGET, config, drawn=drawn)
    assert loss.item() == pytest.approx(0)
    (gradient,) = torch.autograd.grad(loss, z)
    assert gradient[0].tolist() == pytest.approx([-1.125, 1.125, 0, 0])
    clipped = rule.loss(
        "ppo", z, [CRITIC], TARGET, config, BaselineConfig(ppo_clip=0.1), drawn=drawn, snapshot=snapshot
    )
    assert clipped.item() == pytest.approx(-(0.9 * -2.25 + 1.1 * 2.25) / 2)  # both ratios are clipped
    assert (torch.autograd.grad(clipped, z)[0] == 0).all()
    free = rule.loss("ppo", z, [CRITIC], TARGET, config, BaselineConfig(ppo_clip=0.99), drawn=drawn, snapshot=snapshot)
    assert free.item() == pytest.approx(-(0.5 * -2.25 + 1.99 * 2.25) / 2)


def test_released_agrees_with_the_released_function():
    """Figures that the public function itself printed; tests/objective/released.json says which revision and how."""
    cases = json.loads((Path(__file__).parent / "released.json").read_text())["cases"]
    for case in cases:
        player = torch.tensor(case["player"], dtype=torch.float64, requires_grad=True)
        critic, targets = torch.tensor(case["critic"], dtype=torch.float64), torch.tensor(case["targets"])
        loss = rule.loss("avatarl", player, [critic], targets, AvataRLConfig.released(**case["overrides"]))
        loss.backward()
        assert loss.item() == pytest.approx(case["loss"], abs=1e-5)
        torch.testing.assert_close(player.grad, torch.tensor(case["gradient"]).double(), atol=1e-6, rtol=0)


def test_the_articles_worked_example():
    """Critic 60, 30, 8 and 2 %: the article prints 82, 15, 2 and 0.1 %; its formula gives these."""
    critic = logs(0.60, 0.30, 0.08, 0.02)
    found = rule.landscape(critic, [critic], torch.tensor([0]), AvataRLConfig.article(top_k=4))
    assert [round(100 * p, 1) for p in found.consensus[0].tolist()] == [85.4, 6.9, 4.6, 3.1]


def test_alone_or_vetoed_the_target_has_everything():
    alone = rule.landscape(PLAYER, [PLAYER], TARGET, AvataRLConfig(top_k=1))
    assert alone.active.sum() == 1 and alone.rewards[0].tolist() == [1.5, 0, 0, 0]
    critic = CRITIC.clone()
    critic[0, 0] = -torch.inf
    vetoed = rule.landscape(PLAYER, [critic], TARGET, AvataRLConfig(top_k=2, smoothing=0.0))
    assert vetoed.consensus[0].tolist() == [1, 0, 0, 0]


def test_ignored_positions_and_the_count():
    player, critic = PLAYER.repeat(3, 1), CRITIC.repeat(3, 1)
    config, one = AvataRLConfig(**EVEN), rule.loss("avatarl", PLAYER, [CRITIC], TARGET, AvataRLConfig(**EVEN))
    targets = torch.tensor([0, -100, 0])
    assert rule.loss("avatarl", player, [critic], targets, config) == pytest.approx(one.item())
    assert rule.loss("avatarl", player, [critic], targets, config, num_valid=8) == pytest.approx(one.item() / 4)


def test_the_rule_imports_nothing_of_the_package_but_its_settings():
    tree = ast.parse(Path(rule.__file__).read_text())
    local = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    foreign = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    assert local == ["config"] and not any(name.startswith("avatarl") for name in foreign)
