"""Settings that change over time: a step's values as tensors are the same as settings of those values."""

import dataclasses

import pytest
import torch

from avatarl import AvataRLConfig
from avatarl.objective import BaselineConfig, Scheduled, make_objective, objective_loss

from .cases import random_inputs

BASE = AvataRLConfig(top_k=3, critic_weight=(0.2, 0.1))
CONFIGS = {
    "article": BASE,
    "no threshold": dataclasses.replace(BASE, threshold="none"),
    "mass": dataclasses.replace(BASE, threshold="mass"),
    "arithmetic": dataclasses.replace(BASE, pool="arithmetic", threshold="none", tail="target"),
    "dense": dataclasses.replace(BASE, pool="arithmetic", threshold="none", tail="dense"),
    "sample": dataclasses.replace(BASE, pool="arithmetic", threshold="none", tail="sample"),
    "critics alone": AvataRLConfig(top_k=3, reality_weight=0.0, critic_weight=(0.6, 0.4), threshold="none"),
}
FACTORS = (0.5, 0.25)


def answer(objective, scheduled=None):
    player, critics, targets = random_inputs(critics=2)
    uniforms = torch.full((24, objective.num_uniforms), 0.4, dtype=torch.float64) if objective.num_uniforms else None
    value, metrics = objective_loss(objective, player, critics, targets, uniforms=uniforms, scheduled=scheduled)
    return value, torch.autograd.grad(value, player)[0], metrics


def values(factors, smoothing, entropy_coef) -> Scheduled:
    return Scheduled(*(torch.tensor(value, dtype=torch.float64) for value in (factors, smoothing, entropy_coef)))


CASES = [(case, name) for case in CONFIGS for name in ("avatarl", "expected_reward", "reinforce")]


@pytest.mark.parametrize("case, name", [pair for pair in CASES if pair[0] != "dense" or pair[1] == "avatarl"])
def test_values_of_a_step_are_settings(case, name):
    config = CONFIGS[case]
    now = [factor * weight for factor, weight in zip(FACTORS, config.critic_weight, strict=True)]
    left = sum(config.critic_weight) - sum(now)
    wanted = dataclasses.replace(
        config,
        critic_weight=tuple(now),
        reality_weight=config.reality_weight + left,
        smoothing=0.05,
        entropy_coef=0.2,
    )
    expected = answer(make_objective(name, wanted, BaselineConfig(samples=3)))
    found = answer(make_objective(name, config, BaselineConfig(samples=3)), values(FACTORS, 0.05, 0.2))
    for one, other in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(one, other)
    assert {k: v.item() for k, v in found[2].items()} == pytest.approx({k: v.item() for k, v in expected[2].items()})
    constant = answer(make_objective(name, config, BaselineConfig(samples=3)))
    assert (constant[1] - expected[1]).abs().max() > 1e-3 * expected[1].abs().max()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_factors_of_one_change_nothing(smoothing):
    """Also where the text's weight is 0 and its logarithms are −∞."""
    config = dataclasses.replace(CONFIGS["critics alone"], smoothing=smoothing)
    found = answer(make_objective("avatarl", config), values((1.0, 1.0), smoothing, 0.01))
    expected = answer(make_objective("avatarl", config))
    for one, other in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(one, other)


def test_distillation_turns_to_likelihood():
    before, after = (
        make_objective("distillation", baseline=BaselineConfig(distillation_alpha=alpha)) for alpha in (0.2, 0.6)
    )
    found, expected = answer(before, values((0.5, 0.5), 0.0, 0.0)), answer(after)
    for one, other in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(one, other)


def test_new_values_need_no_new_graph():
    player, critics, targets = random_inputs(critics=2, dtype=torch.float32)
    objective, graphs = make_objective("avatarl", BASE), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True)
    def loss(player, scheduled):
        return objective_loss(objective, player, critics, targets, scheduled=scheduled)[0]

    torch._dynamo.reset()
    losses = []
    for factor in (1.0, 0.7, 0.2):
        scheduled = Scheduled(torch.full((2,), factor), torch.tensor(0.1), torch.tensor(0.01))
        losses.append(loss(player, scheduled).item())
        assert losses[-1] == pytest.approx(
            objective_loss(objective, player, critics, targets, scheduled=scheduled)[0].item(), rel=1e-5
        )
    assert len(graphs) == 1 and len(set(losses)) == 3
