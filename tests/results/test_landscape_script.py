"""The page's own computation of rewards against the objective's, for every rule, in a JavaScript engine."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from avatarl import AvataRLConfig, reward_landscape
from avatarl.objective import AvataRL, LiveAnswers
from avatarl.objective.objectives import LossInputs
from avatarl.results.inspector import answers_of, thresholds
from avatarl.results.pages import read_source
from avatarl.results.payouts import rounded, settings_of

mini_racer = pytest.importorskip("py_mini_racer", reason="mini-racer is not installed (extra dev)")

VOCABULARY, POSITIONS = 60, 12
KEPT_UNDER = AvataRLConfig.article()  # what was asked of the models is asked before a reader changes anything
CHANGED = {
    "article": {},
    "released": dict(top_k=4, threshold="mass", entropy_coef=0.0, per_action_mean=True),
    "one proposal": dict(top_k=1),
    "all that is kept": dict(top_k=32),
    "top-p": dict(top_k=20, top_p=0.6),
    "tight top-p": dict(top_p=0.01),
    "no smoothing": dict(smoothing=0.0),
    "much smoothing": dict(smoothing=0.6, threshold="none"),
    "no threshold": dict(threshold="none", top_k=6),
    "no cap": dict(reward_cap=None, reward_scale=3.0),
    "low cap": dict(reward_cap=0.2, threshold="none"),
    "critic alone": dict(reality_weight=0.0, critic_weight=1.0, threshold="none"),
    "critic alone, no smoothing": dict(reality_weight=0.0, critic_weight=1.0, smoothing=0.0),
    "text alone": dict(critic_weight=0.0),
    "much bonus": dict(entropy_coef=0.5),
    "tail to the target": dict(tail="target", threshold="none"),
    "arithmetic": dict(pool="arithmetic"),
    "arithmetic, normalised": dict(pool="arithmetic", tail="renormalise", threshold="none"),
    "arithmetic, mostly critic": dict(pool="arithmetic", reality_weight=0.1, critic_weight=0.9),
    "critics propose alone": dict(player_proposes=False),
    "dense": dict(pool="arithmetic", tail="dense", threshold="none"),
    "dense, no cap": dict(pool="arithmetic", tail="dense", threshold="none", reward_cap=None, reward_scale=1.0),
}


@pytest.fixture(scope="module")
def script():
    engine = mini_racer.MiniRacer()
    engine.eval(str(read_source("landscape.js")) + ";const call = (pair) => JSON.stringify(landscapeOf(...pair));")
    return lambda answers, settings: json.loads(engine.eval(f"call({json.dumps([answers, settings])})"))


def logits_of(seed: int, critics: int, spread=3.0) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    player, *judges = (
        spread * torch.randn(POSITIONS, VOCABULARY, generator=generator, dtype=torch.float64)
        for _ in range(1 + critics)
    )
    targets = torch.randint(VOCABULARY, (POSITIONS,), generator=generator)
    targets[0] = player[0].argmax()  # proposed by the player
    targets[1] = judges[0][1].argmax() if judges else 0
    return player, judges, targets


def loss_of(config, player, critics, targets):
    """Metrics and gradient of each position by itself."""
    live = [LiveAnswers(logits) for logits in critics]
    return AvataRL(config).loss_and_gradient(
        LossInputs(player.clone(), live, targets, torch.ones_like(player[:, 0])), True
    )


@pytest.mark.parametrize("critics", [0, 1, 2])
@pytest.mark.parametrize("name", CHANGED)
def test_the_page_computes_what_the_objective_computes(script, name: str, critics: int):
    changes = CHANGED[name]
    if critics == 0:
        changes = {**changes, "reality_weight": 1.0, "critic_weight": 0.0}
    if critics == 2 and name == "arithmetic, mostly critic":
        changes = {**changes, "critic_weight": (0.7, 0.2)}
    config = AvataRLConfig.article(**changes)
    player, judges, targets = logits_of(seed=len(name), critics=critics)
    kept_under = dataclasses.replace(config, top_k=KEPT_UNDER.top_k, top_p=None)
    landscape = reward_landscape(player, judges, targets, config)
    scores = loss_of(config, player, judges, targets)
    bars = thresholds(landscape, config)
    for number, answers in enumerate(answers_of(player, judges, targets, kept_under)):
        found = script(rounded(answers), settings_of(config))
        valid = landscape.valid[number]
        expected = {
            "token": landscape.actions[number, valid],
            "policy": player[number].softmax(-1)[landscape.actions[number, valid]],
            "reality": landscape.reality[number, valid],
            "consensus": landscape.consensus[number, valid],
            "reward": landscape.rewards[number, valid],
            "gradient": scores.gradient[number, landscape.actions[number, valid]],
        }
        for field, values in expected.items():
            assert [action[field] for action in found["actions"]] == pytest.approx(values.tolist(), rel=1e-6, abs=1e-8)
        for critic in range(critics):
            probs = [action["critic"][critic] for action in found["actions"]]
            assert probs == pytest.approx(landscape.critic[critic, number, valid].tolist(), rel=1e-7)
        assert found["threshold"] == (None if bars[number] is None else pytest.approx(bars[number], rel=1e-7))
        for metric, values in scores.metrics.items():
            if metric not in ("loss", "entropy"):  # the page keeps the policy's entropy, and shows no loss
                assert found[metric] == pytest.approx(values[number].item(), rel=1e-6, abs=1e-7), metric


@pytest.mark.parametrize("spread", [10.0, 40.0])
@pytest.mark.parametrize("name", ["tail to the target", "critic alone", "arithmetic", "dense"])
def test_what_a_sure_critic_leaves_is_not_rounding(script, name, spread):
    """The mass beyond the active actions is e⁻⁴⁰ or less, where one minus the others is 10⁻¹⁶ or nothing."""
    config = AvataRLConfig.article(**(dict(top_k=4) | CHANGED[name]))
    if name == "critic alone":
        config = dataclasses.replace(config, tail="target")
    player, judges, targets = logits_of(seed=8, critics=1, spread=spread)
    landscape = reward_landscape(player, judges, targets, config)
    for number, answers in enumerate(answers_of(player, judges, targets, config)):
        found = script(rounded(answers), settings_of(config))
        expected = landscape.consensus[number, landscape.valid[number]].tolist()
        assert [action["consensus"] for action in found["actions"]] == pytest.approx(expected, rel=2e-6, abs=1e-200)


def test_the_best_of_a_dense_tail_may_be_no_action(script):
    """Two critics agree on their second choices, which neither of them proposes."""
    player, critic, _ = torch.zeros(3, 1, VOCABULARY, dtype=torch.float64)
    critic, other = critic.clone(), critic.clone()
    critic[0, 3] = other[0, 4] = 3.0
    critic[0, 5] = other[0, 5] = 2.9
    player[0, 5], targets = 9.0, torch.tensor([7])
    config = AvataRLConfig.dense(top_k=1, player_proposes=False, reality_weight=0.05, critic_weight=(0.6, 0.35))
    scores = loss_of(config, player, [critic, other], targets)
    (answers,) = answers_of(player, [critic, other], targets, config)
    found = script(rounded(answers), settings_of(config))
    assert len(found["actions"]) == 3 and all(action["token"] != 5 for action in found["actions"])
    share = scores.metrics["expected_reward_share"].item()
    assert 0.9 < share <= 1 and found["expected_reward_share"] == pytest.approx(share, rel=1e-6)


def test_a_temperature_of_the_loss_is_that_of_the_inspected_run(script):
    config = AvataRLConfig.released(top_k=5, temperature=1.7, entropy_coef=0.1)
    player, judges, targets = logits_of(seed=3, critics=1)
    landscape = reward_landscape(player, judges, targets, config)
    scores = loss_of(config, player, judges, targets)
    for number, answers in enumerate(answers_of(player, judges, targets, config)):
        found = script(rounded(answers), settings_of(config))
        gradient = scores.gradient[number, landscape.actions[number, landscape.valid[number]]].tolist()
        assert [action["gradient"] for action in found["actions"]] == pytest.approx(gradient, rel=1e-6, abs=1e-8)


def test_a_critic_that_rules_the_text_out(script):
    """ε = 0 and a critic without any belief in the target: the blend vetoes every action but gives the text's all."""
    player, (critic,), targets = logits_of(seed=4, critics=1)
    critic.scatter_(1, targets[:, None], -torch.inf)
    config = AvataRLConfig.article(smoothing=0.0)
    landscape = reward_landscape(player, [critic], targets, config)
    for number, answers in enumerate(answers_of(player, [critic], targets, config)):
        found = script(rounded(answers), settings_of(config))
        rewards = landscape.rewards[number, landscape.valid[number]].tolist()
        assert [action["reward"] for action in found["actions"]] == pytest.approx(rewards)


def test_who_proposed_an_action_is_said(script):
    player, judges, targets = logits_of(seed=5, critics=2)
    config = AvataRLConfig.article(top_k=5)
    for number, answers in enumerate(answers_of(player, judges, targets, config)):
        for action in script(rounded(answers), settings_of(config))["actions"]:
            voices = {"player": player, "critic 1": judges[0], "critic 2": judges[1]}
            expected = [who for who, logits in voices.items() if action["token"] in logits[number].topk(5).indices]
            if action["token"] == targets[number]:
                expected = ["text", *expected]
            assert action["proposedBy"] == expected
