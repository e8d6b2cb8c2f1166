"""NaN where a position counts reaches the loss, so that the guard sees it; where it is ignored it touches nothing."""

import dataclasses

import pytest
import torch
from torch import Tensor

from avatarl import AvataRLConfig, avatarl_loss
from avatarl.objective import (
    OBJECTIVES,
    BaselineConfig,
    engine,
    linear_objective_loss,
    make_objective,
    objective_loss,
)

from .cases import cached as stored
from .cases import random_inputs
from .test_cached import SAMPLE

POSITIONS, VOCABULARY, ROW = 10, 37, 4
ARITHMETIC = AvataRLConfig(top_k=3, pool="arithmetic", threshold="none")
CONFIGS = {
    "article": AvataRLConfig.article(top_k=3),
    "released": AvataRLConfig.released(),
    "no threshold": AvataRLConfig.article(top_k=3, threshold="none"),
    "no cap": AvataRLConfig.article(top_k=3, reward_cap=None),
    "no bonus": AvataRLConfig.article(top_k=3, entropy_coef=0.0),
    "one proposal": AvataRLConfig.article(top_k=1),
    "top-p": AvataRLConfig.article(top_k=5, top_p=0.4),
    "critics propose alone": AvataRLConfig.article(top_k=3, player_proposes=False),
    "critic alone": AvataRLConfig.article(top_k=3, reality_weight=0.0, critic_weight=1.0),
    "geometric, target": AvataRLConfig.article(top_k=3, tail="target"),
    "arithmetic": AvataRLConfig.article(top_k=3, pool="arithmetic"),
    "arithmetic, renormalise": AvataRLConfig.article(top_k=3, pool="arithmetic", tail="renormalise"),
    "dense": AvataRLConfig.dense(top_k=3),
    "dense with a cap": dataclasses.replace(ARITHMETIC, tail="dense"),
    "sample": dataclasses.replace(ARITHMETIC, tail="sample"),
}
REWARDED = ("avatarl", "expected_reward", "ppo", "reinforce")
FEW = ("article", "released", "no threshold", "sample")
CASES = [
    (name, config)
    for name in sorted(OBJECTIVES)
    for config in (CONFIGS if name == "avatarl" else FEW if name in REWARDED else FEW[:1])
]
STORED = ("log_probs", "log_rest")
PATHS = ("logits", "hidden states")


class Models:
    """A player, two critics and a snapshot at some positions: logits, or hidden states whose head is the identity."""

    def __init__(self, name: str, config: str):
        generator = torch.Generator().manual_seed(1)
        self.objective = make_objective(name, CONFIGS[config], BaselineConfig(samples=3))
        self.logits = {
            who: 3 * torch.randn(POSITIONS, VOCABULARY, generator=generator)
            for who in ("player", "critic", "other critic", "snapshot")
        }
        self.targets = torch.randint(VOCABULARY, (POSITIONS,), generator=generator)
        self.uniforms = torch.rand(POSITIONS, self.objective.num_uniforms, generator=generator)

    @property
    def who(self) -> list[str]:
        """The models that the loss depends on."""
        critics = ["critic", "other critic"] if self.objective.needs_critic else []
        return ["player", *critics, *(["snapshot"] if self.objective.needs_snapshot else [])]

    def loss(self, path: str) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        """Loss, metrics and gradients, over the logits or over states and head."""
        player, *critics, snapshot = self.logits.values()
        head = torch.eye(VOCABULARY)
        leaves = [player.clone().requires_grad_()]
        common = dict(uniforms=self.uniforms if self.objective.num_uniforms else None)
        needs_snapshot = self.objective.needs_snapshot
        if path == "logits":
            common |= dict(snapshot_logits=snapshot if needs_snapshot else None)
            loss, metrics = objective_loss(self.objective, *leaves, critics, self.targets, **common)
        else:
            leaves.append(head.clone().requires_grad_())
            common |= dict(snapshot=(snapshot, head) if needs_snapshot else None)
            loss, metrics = linear_objective_loss(self.objective, *leaves, critics, [head] * 2, self.targets, **common)
        return loss.detach(), metrics, list(torch.autograd.grad(loss, leaves))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setitem(engine.CHUNK_ROWS, "cpu", 4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name, config", CASES)
def test_at_a_counted_position(name, config, path):
    for who in Models(name, config).who:
        for value in (torch.nan, torch.inf) if path == "logits" else (torch.nan,):
            for token in (0, 20):
                models = Models(name, config)
                models.logits[who][ROW, token] = value
                loss, metrics, (gradient, *_) = models.loss(path)
                assert loss.isnan(), (who, value, token)
                if who.endswith("critic") and name in REWARDED:
                    finite = {key for key, number in metrics.items() if number.isfinite()}
                    assert finite == {"cross_entropy", "entropy", "active_actions"}
                others = gradient[torch.arange(POSITIONS) != ROW]
                assert path == "hidden states" or others.isfinite().all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name, config", CASES)
def test_at_an_ignored_position(name, config, path):
    clean = Models(name, config)
    clean.targets[ROW] = -100
    expected = clean.loss(path)
    for who in clean.logits:
        for value in (torch.nan, torch.inf, -torch.inf):
            models = Models(name, config)
            models.targets[ROW] = -100
            models.logits[who][ROW] = value
            loss, metrics, gradients = models.loss(path)
            assert loss == expected[0] and loss.isfinite(), (who, value)
            assert all(number == expected[1][key] for key, number in metrics.items()), (who, value)
            assert all(map(torch.equal, gradients, expected[2])), (who, value)
            assert (gradients[0][ROW] == 0).all()


def test_a_critic_of_weight_zero_is_dropped_with_its_nan():
    player, critics, targets = random_inputs(critics=2)
    critics[1][3] = torch.nan
    loss, metrics = avatarl_loss(player, critics, targets, AvataRLConfig.article(critic_weight=(0.3, 0.0)))
    loss.backward()
    assert player.grad.isfinite().all() and all(number.isfinite() for number in metrics.values())


@pytest.mark.parametrize(
    "config, field",
    [
        *((config, field) for config in (CONFIGS["article"], CONFIGS["released"], SAMPLE) for field in STORED),
        (dataclasses.replace(CONFIGS["top-p"], player_proposes=False), "log_probs"),
        (dataclasses.replace(SAMPLE, player_proposes=False), "log_rest"),
    ],
)
def test_what_is_stored_of_a_critic(config, field):
    """Of a rest of NaN, tokens are active or drawn; of the most likely tokens, the last one is enough."""
    player, (critic,), targets = random_inputs(spread=1.0)
    held = stored(critic, targets, 5, 3, torch.full((24, 1), 0.4, dtype=torch.float64))
    getattr(held, field).view(24, -1)[3, -1] = torch.nan
    config = dataclasses.replace(config, top_k=5)
    assert avatarl_loss(player, held, targets, config)[0].isnan()
    targets[3] = -100
    head, objective = torch.eye(29, dtype=torch.float64).requires_grad_(), make_objective("avatarl", config)
    for loss, leaves in (
        (avatarl_loss(player, held, targets, config)[0], [player]),
        (linear_objective_loss(objective, player, head, held, None, targets)[0], [player, head]),
    ):
        assert loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, leaves))


def test_a_token_that_is_ruled_out_is_none():
    player, (critic,), targets = random_inputs()
    critic[:, 7] = player.data[:, 8] = -torch.inf
    targets[targets == 8] = 9  # whose loss would be infinite
    targets[0] = 7
    for config in CONFIGS.values():
        loss, metrics = avatarl_loss(player, critic, targets, config)
        assert loss.isfinite() and all(number.isfinite() for number in metrics.values())
