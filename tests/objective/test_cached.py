"""Critics that answer from what a cache holds: exact where all is stored, unbiased where tokens were drawn."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from avatarl import AvataRLConfig, avatarl_loss, linear_avatarl_loss, reward_landscape
from avatarl.objective import BaselineConfig, CachedAnswers, make_objective, objective_loss

from .cases import cached as stored
from .cases import random_inputs

VOCABULARY = 29
CONFIG = AvataRLConfig(top_k=3, threshold="none")
RULES = {
    "geometric, renormalise": CONFIG,
    "geometric, mass": AvataRLConfig.released(),
    "geometric, target": dataclasses.replace(CONFIG, tail="target"),
    "arithmetic, renormalise": dataclasses.replace(CONFIG, pool="arithmetic", tail="renormalise"),
    "arithmetic, target": dataclasses.replace(CONFIG, pool="arithmetic", tail="target"),
    "top_p": dataclasses.replace(CONFIG, top_p=0.7),
    "critics propose alone": dataclasses.replace(CONFIG, player_proposes=False),
}
DENSE = dataclasses.replace(CONFIG, pool="arithmetic", tail="dense")
SAMPLE = dataclasses.replace(DENSE, tail="sample")


def gradient(critic, player, targets, config, **arguments) -> Tensor:
    loss, _ = avatarl_loss(player, critic, targets, config, **arguments)
    return torch.autograd.grad(loss, player)[0]


@pytest.mark.parametrize("rule", RULES)
def test_a_whole_distribution_in_store_is_the_critic(rule):
    player, (critic,), targets = random_inputs()
    held, config = stored(critic, targets, VOCABULARY), RULES[rule]
    live, metrics = avatarl_loss(player, critic, targets, config)
    cached, found = avatarl_loss(player, held, targets, config)
    assert cached.item() == pytest.approx(live.item(), rel=1e-12)
    torch.testing.assert_close(gradient(held, player, targets, config), gradient(critic, player, targets, config))
    assert found.pop("estimated_share") == 0
    assert found.keys() == metrics.keys() and found["critic_wins"] == metrics["critic_wins"]
    landscapes = [reward_landscape(player, each, targets, config) for each in (held, critic)]
    for one, other in zip(*landscapes, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "top_p"])
def test_the_rest_by_frequency_is_exact_where_it_is_by_frequency(rule):
    player, (critic,), targets = random_inputs()
    frequencies = torch.randn(VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(8)).log_softmax(
        0
    )
    fifth = critic.topk(5, dim=1).values[:, -1:]
    critic = torch.where(critic >= fifth, critic + 20, frequencies)
    found = gradient(stored(critic, targets, 5, log_frequencies=frequencies), player, targets, RULES[rule])
    torch.testing.assert_close(found, gradient(critic, player, targets, RULES[rule]))


def test_an_estimate_is_no_more_than_the_least_likely_stored():
    critic = torch.tensor([[5.0, 4.0, 3.0, 3.0, 3.0, 3.0, 3.0]])
    targets = torch.tensor([0])
    frequent = torch.tensor([-9.0, -9, -9, -9, -9, 0, -9]).log_softmax(0)
    held = stored(critic, targets, 2, log_frequencies=frequent)
    log_probs, is_estimate = held.log_probs_at(torch.tensor([[0, 1, 5, 6]]), torch.float32)
    assert is_estimate.tolist() == [[False, False, True, True]]
    assert log_probs[0, 2] == log_probs[0, 1] > log_probs[0, 3]


def test_the_share_that_is_estimated():
    """By hand: the player proposes 0, 1 and 2, the critic 2, 3 and 4, the target is 1 or 5."""
    player = torch.tensor([[9.0, 8, 7, 0, 0, 0, 0]] * 2, requires_grad=True)
    critic = torch.tensor([[0.0, 0, 9, 8, 7, 0, 0]] * 2)
    targets = torch.tensor([1, 5])
    _, metrics = avatarl_loss(player, stored(critic, targets, 3), targets, CONFIG)
    # Of {1, 0, 2, 3, 4} it has to guess 0; of {5, 0, 1, 2, 3, 4} it has to guess 0 and 1.
    assert metrics["estimated_share"].item() == pytest.approx((1 / 5 + 2 / 6) / 2)
    _, metrics = avatarl_loss(player, [critic, stored(critic, targets, 3)], targets, CONFIG)
    assert metrics["estimated_share"].item() == pytest.approx((1 / 5 + 2 / 6) / 2)  # of cached critics alone


@pytest.mark.parametrize("top", [0, 2, 6])
def test_drawn_tokens_are_unbiased(top):
    """The mean over many caches has the gradient of the whole distribution; that of one cut to its top has not.

    ε = 0: with ε the text's share among the actions depends on which of them the cache lets the critic propose.
    """
    player, (critic,), targets = random_inputs(positions=8, spread=1.5)
    dense, sample = (dataclasses.replace(config, smoothing=0.0, reward_cap=None) for config in (DENSE, SAMPLE))
    expected = gradient(critic, player, targets, dense)
    total, single, count = torch.zeros_like(player), [], 300
    for i in range(count):
        uniforms = torch.full((8, 1), (i + 0.5) / count, dtype=torch.float64)
        held = stored(critic, targets, top, draws=4, uniforms=uniforms)
        found = gradient(held, player, targets, sample)
        total += found / count
        single.append((found - expected).abs().max())
    assert max(single) > 0.02 * expected.abs().max()
    assert (total - expected).abs().max() < 0.03 * max(single)
    if top:
        cut = gradient(stored(critic, targets, 6), player, targets, dataclasses.replace(dense, tail="renormalise"))
        assert (cut - expected).abs().max() > 0.3 * max(single)


def test_the_cap_does_not_follow_what_was_drawn():
    """Where the critic outweighs the text, a token drawn often would otherwise lower all rewards by chance."""
    player, (critic,), targets = random_inputs(positions=8, spread=1.5)
    config = dataclasses.replace(SAMPLE, smoothing=0.0, reality_weight=0.05, critic_weight=0.95)
    totals = []
    for i in range(100):
        uniforms = torch.full((8, 1), (i + 0.5) / 100, dtype=torch.float64)
        held = stored(critic, targets, 0, draws=3, uniforms=uniforms)
        totals.append(reward_landscape(player, held, targets, config).rewards.sum(1))
    assert torch.stack(totals).std(dim=0).max() < 1e-9  # all is paid, always in the same proportion


CAPPED = dataclasses.replace(SAMPLE, smoothing=0.0, reality_weight=0.1, critic_weight=(0.45, 0.45))


@pytest.mark.parametrize("exact", ["live", "top", "whole"])
@pytest.mark.parametrize("first", [True, False])
def test_the_cap_looks_at_what_one_critic_knows(exact, first):
    """The critics' favourite is held by one and estimated by the other: it is paid the cap, and all as under dense."""
    player, (critic, other), targets = random_inputs(positions=8, critics=2, spread=1.5)
    other = torch.where(critic == critic.amax(1, keepdim=True), other.amax(1, keepdim=True) + 2, other)  # they agree
    config, order = dataclasses.replace(CAPPED, reward_cap=1.5), slice(None, None, 1 if first else -1)
    expected = gradient([critic, other][order], player, targets, dataclasses.replace(config, tail="dense"))
    mean, single, count = torch.zeros_like(player), [], 200
    for i in range(count):
        uniforms = torch.full((8, 1), (i + 0.5) / count, dtype=torch.float64)
        knows = {"live": critic, "top": stored(critic, targets, 2, 8, uniforms), "whole": stored(critic, targets, 29)}
        critics = [knows[exact], stored(other, targets, 0, 16, uniforms)][order]
        landscape = reward_landscape(player, critics, targets, config, uniforms=uniforms)
        known = landscape.actions == critic.argmax(1, keepdim=True)
        assert landscape.rewards[known].max() == pytest.approx(1.5) and landscape.rewards.max() < 1.9
        found = gradient(critics, player, targets, config, uniforms=uniforms)
        mean += found / count
        single.append((found - expected).abs().max())
    assert max(single) > 0.02 * expected.abs().max()
    assert (mean - expected).abs().max() < 0.02 * expected.abs().max()


def test_a_critic_without_weight_knows_nothing_for_the_cap():
    player, critics, targets = random_inputs(positions=8, critics=2, spread=1.5)
    uniforms = torch.full((8, 1), 0.5, dtype=torch.float64)
    config = dataclasses.replace(CAPPED, critic_weight=(0.9, 0.0))
    held = stored(critics[0], targets, 0, 3, uniforms)
    one = reward_landscape(player, [held, critics[1]], targets, config, uniforms=uniforms)
    alone = dataclasses.replace(config, critic_weight=0.9)
    mean = [
        avatarl_loss(player, critic, targets, config, uniforms=uniforms)[0].item()
        for critic, config in (([held, critics[1]], config), ([held, held], config), (held, alone))
    ]
    assert mean[0] == pytest.approx(mean[1]) == pytest.approx(mean[2])
    assert one.rewards[:, 0].min() == pytest.approx(1.5)  # the target, which is known


@pytest.mark.parametrize("spread", [3.0, 10.0, 20.0])
@pytest.mark.parametrize("rule", ["geometric, target", "geometric, mass", "arithmetic, target"])
def test_a_sure_critics_rest_is_not_rounding(rule, spread):
    """In float32, where one minus the others' probabilities would be 1e-7 for e⁻³⁰ or for nothing."""
    player, (critic,), targets = random_inputs(spread=spread, dtype=torch.float32)
    held = stored(critic, targets, VOCABULARY)
    assert (held.log_rest == -torch.inf).all()
    exact, found = (
        reward_landscape(player.to(each.log_rest.dtype), each, targets, RULES[rule])
        for each in (stored(critic.double(), targets, VOCABULARY), held)
    )
    torch.testing.assert_close(found.consensus, exact.consensus.float(), rtol=2e-4, atol=1e-6)
    live = reward_landscape(player, critic, targets, RULES[rule])
    torch.testing.assert_close(live.consensus, exact.consensus.float(), rtol=2e-4, atol=1e-6)


def test_what_all_but_one_token_leave_of_the_text_is_not_rounding():
    """Of what is not stored, nearly all frequencies are known: the last token gets all of the rest."""
    generator = torch.Generator().manual_seed(2)
    critic = torch.randn(4, VOCABULARY, generator=generator)
    critic[:, -1] = critic.amin(1) - 1
    frequencies = torch.cat([torch.zeros(VOCABULARY - 1), torch.tensor([-20.0])]).log_softmax(0)
    held = stored(critic, torch.arange(4), VOCABULARY - 1, log_frequencies=frequencies)
    last = torch.full((4, 1), VOCABULARY - 1)
    log_probs, is_estimate = held._replace(log_probs=held.log_probs + 0).log_probs_at(last, torch.float32)
    assert is_estimate.all()
    torch.testing.assert_close(log_probs, critic.log_softmax(1)[:, -1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("probs", [[1.0], [math.exp(-62.5 / 2048), 0.015, 0.01, 0.004, 0.001]])
def test_rounding_does_not_decide_what_a_sure_critic_gives_the_target(probs: list[float]):
    """What is left besides the four most likely tokens: 1e-5, or 1e-3 where the favourite is off by 2e-4."""
    critic = -25 - torch.arange(64, dtype=torch.float64).unsqueeze(0) / 16  # no ties
    critic[0, [0, 10, 11, 12, 13][: len(probs)]] = torch.tensor(probs, dtype=torch.float64).log()
    critic[0, 5] = -10.0
    player, targets = torch.arange(64, dtype=torch.float64).unsqueeze(0) / 16, torch.tensor([5])
    config = AvataRLConfig(top_k=4, tail="target", threshold="none")
    held = stored(critic, targets, 8)
    rounded = held._replace(
        log_probs=(held.log_probs * 2048).round() / 2048, log_rest=(held.log_rest * 2048).round() / 2048
    )
    expected, found = (reward_landscape(player, each, targets, config).consensus[0, 0] for each in (critic, rounded))
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("top", [0, 3])
def test_distillation_from_drawn_tokens_is_unbiased(top):
    player, (critic,), targets = random_inputs(positions=8, spread=1.5)
    objective = make_objective("distillation", baseline=BaselineConfig(distillation_alpha=0.3))
    loss, _ = objective_loss(objective, player, critic, targets)
    (expected,) = torch.autograd.grad(loss, player)
    mean, total, count = 0.0, torch.zeros_like(player), 300
    for i in range(count):
        uniforms = torch.full((8, 1), (i + 0.5) / count, dtype=torch.float64)
        held = stored(critic, targets, top, draws=3, uniforms=uniforms)
        found, _ = objective_loss(objective, player, held, targets)
        total += torch.autograd.grad(found, player)[0] / count
        mean += found.item() / count
    assert mean == pytest.approx(loss.item(), rel=1e-3)
    assert (total - expected).abs().max() < 0.01 * expected.abs().max()


def test_live_and_cached_critics_in_their_order():
    player, critics, targets = random_inputs(critics=3)
    held = [stored(critic, targets, VOCABULARY) for critic in critics]
    config = dataclasses.replace(CONFIG, critic_weight=(0.25, 0.0, 0.05))
    expected = gradient(critics, player, targets, config)
    for mixed in ([critics[0], held[1], critics[2]], [held[0], critics[1], held[2]]):
        torch.testing.assert_close(gradient(mixed, player, targets, config), expected)
    swapped = gradient([held[2], critics[1], held[0]], player, targets, config)
    assert (swapped - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("compiles", [False, True])
def test_the_fused_path_takes_both(compiles):
    generator = torch.Generator().manual_seed(3)
    hidden, critic_hidden = (torch.randn(3, 7, 16, generator=generator) for _ in range(2))
    head, critic_head = (torch.randn(VOCABULARY, 16, generator=generator) for _ in range(2))
    hidden.requires_grad_(), head.requires_grad_()
    targets = torch.randint(VOCABULARY, (3, 7), generator=generator)
    critic_logits = critic_hidden @ critic_head.t()
    flat = stored(critic_logits.flatten(0, 1), targets.flatten(), 6)
    held = CachedAnswers(*(tensor.unflatten(0, (3, 7)) for tensor in flat[:-1]), flat.log_frequencies)
    config = dataclasses.replace(CONFIG, critic_weight=(0.2, 0.1))

    def fused(hidden, head):
        return linear_avatarl_loss(hidden, head, [held, critic_hidden], [None, critic_head], targets, config)

    plain, metrics = avatarl_loss(hidden @ head.t(), [held, critic_logits], targets, config)
    found, same = (torch.compile(fused, fullgraph=True, backend="eager") if compiles else fused)(hidden, head)
    assert found.item() == pytest.approx(plain.item(), rel=1e-5)
    assert same.keys() == metrics.keys() and same["estimated_share"] == metrics["estimated_share"] > 0
    expected = torch.autograd.grad(plain, (hidden, head))
    for one, other in zip(torch.autograd.grad(found, (hidden, head)), expected, strict=True):
        torch.testing.assert_close(one, other)
    alone, _ = linear_avatarl_loss(hidden, head, held, None, targets, CONFIG)
    assert alone.item() == pytest.approx(avatarl_loss(hidden @ head.t(), held, targets, CONFIG)[0].item(), rel=1e-5)


@pytest.mark.parametrize(
    "config, message",
    [
        (DENSE, "tail='dense' needs a live critic, and a cached one is given; use tail='sample'"),
        (SAMPLE, r"tail='sample' needs a cache with drawn tokens \(kind sample\); found one of kind top"),
        (dataclasses.replace(CONFIG, top_k=6), "has 5 of its most likely tokens at a position; top_k=6 .* as many"),
    ],
)
def test_what_a_cache_cannot_answer(config, message):
    player, (critic,), targets = random_inputs()
    with pytest.raises(ValueError, match=message):
        avatarl_loss(player, stored(critic, targets, 5), targets, config)


def test_distillation_refuses_a_distribution_that_is_cut():
    player, (critic,), targets = random_inputs()
    with pytest.raises(ValueError, match="most likely tokens alone would teach another distribution"):
        objective_loss(make_objective("distillation"), player, stored(critic, targets, 5), targets)


def test_what_is_stored_of_other_positions_or_tokens():
    player, (critic,), targets = random_inputs()
    held = stored(critic, targets, 5)
    with pytest.raises(ValueError, match=r"cached critic \(24,\) does not fit targets \(23,\)"):
        avatarl_loss(player[1:], held, targets[1:], CONFIG)
    with pytest.raises(ValueError, match="cached critic has 29 tokens; expected the player's 28"):
        avatarl_loss(player, held, targets.clamp(max=27), CONFIG, vocab_size=28)


@pytest.mark.parametrize("tops", [(0, 2, 9), (9, 0, 2)])
def test_caches_propose_no_more_than_they_store(tops):
    """No columns for proposals that are not there; what is paid and who wins stay those of each critic's own list."""
    player, critics, targets = random_inputs(critics=3)
    uniforms = torch.rand(len(targets), 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    held = [stored(critic, targets, top, 8, uniforms) for critic, top in zip(critics, tops, strict=True)]
    config = dataclasses.replace(SAMPLE, top_k=4, reality_weight=0.1, critic_weight=0.9)
    landscape = reward_landscape(player, held, targets, config)
    width = 1 + 4 + sum(min(4, top) for top in tops)
    assert landscape.valid[:, :width].any(dim=0).all()
    metrics = avatarl_loss(player, held, targets, config)[1]
    rewards = torch.where(landscape.valid, landscape.rewards, 0.0)
    wins = [
        (torch.where(landscape.actions == critic.tokens[:, 1:2], rewards, 0.0).amax(dim=1) > rewards[:, 0]).double()
        for critic in held
        if critic.num_top
    ]
    assert float(metrics["critic_wins"]) == pytest.approx(float(sum(wins).mean() / 3)) and float(sum(wins).sum()) > 0
