"""Facts that docs/method.md states about the reward landscape; test_paths.py holds it against the rule."""

import math

import pytest
import torch

from avatarl import AvataRLConfig, UserError, reward_landscape

from .cases import CONFIGS, random_inputs


def test_the_threshold_of_float64_is_not_rounded_to_float32():
    """A third is smaller than float32's third by more than what the first action has above it."""
    critic = torch.tensor([[1 / 3 + 2e-9, 1 / 3 - 1e-9, 1 / 3 - 1e-9]], dtype=torch.float64).log()
    config = AvataRLConfig(top_k=3, reality_weight=0.0, critic_weight=1.0)
    landscape = reward_landscape(critic, critic, torch.tensor([0]), config)
    assert landscape.valid.sum() == 3
    assert (landscape.rewards > 0).tolist()[0] == [column == 0 for column in range(landscape.actions.shape[1])]


def test_a_list_of_one_critic_keeps_its_dimension():
    player, critics, targets = random_inputs()
    assert reward_landscape(player, critics, targets).critic.dim() == 3


def test_an_even_split_is_a_product_of_more_experts():
    player, (critic,), targets = random_inputs()
    one = reward_landscape(player, critic, targets, AvataRLConfig.article(top_k=4))
    two = reward_landscape(player, [critic, critic], targets, AvataRLConfig.article(top_k=4))
    assert torch.allclose(one.rewards, two.rewards[:, :9])


def test_no_critic_at_all():
    player, _, targets = random_inputs()
    config = AvataRLConfig.article(top_k=4, critic_weight=0.0)
    landscape = reward_landscape(player, None, targets, config)
    assert landscape.actions.shape == (24, 5) and landscape.critic is None
    with pytest.raises(UserError, match="no critic is given"):
        reward_landscape(player, None, targets)


def test_experts_are_distributions():
    player, (critic,), targets = random_inputs()
    landscape = reward_landscape(player, critic, targets, CONFIGS["arithmetic, target"])
    for expert in (landscape.reality, landscape.consensus):
        assert torch.allclose(expert.sum(1), torch.ones(24, dtype=torch.float64))


def test_no_reward_is_negative_by_rounding():
    """A critic that leaves the target nothing: what the linear pool gives the target is one minus a rounded sum."""
    player, (critic,), targets = random_inputs(positions=200, vocabulary=8, dtype=torch.float32, spread=30.0)
    config = AvataRLConfig.article(
        top_k=8, pool="arithmetic", reality_weight=0.0, critic_weight=1.0, threshold="none", reward_cap=None
    )
    landscape = reward_landscape(player, critic, targets, config)
    assert landscape.consensus.min() == 0 and landscape.rewards.min() == 0


def test_padding_of_the_vocabulary_is_never_active_and_outside_the_softmax():
    player, (critic,), targets = random_inputs()
    pad = torch.full((24, 7), 50.0, dtype=torch.float64)
    padded = reward_landscape(torch.cat([player, pad], 1), torch.cat([critic, pad[:, :3]], 1), targets, vocab_size=29)
    plain = reward_landscape(player, critic, targets)
    for found, expected in zip(padded, plain, strict=True):
        assert torch.equal(found, expected)


def test_alone_the_target_is_kept_under_every_rule():
    logits = torch.tensor([[9.0, 0.0, 0.0]])
    for threshold in ("mean", "mass", "none"):
        landscape = reward_landscape(
            logits, logits, torch.tensor([0]), AvataRLConfig.article(top_k=1, threshold=threshold)
        )
        assert landscape.valid.sum() == 1
        assert landscape.reality[0, 0] == 1
        assert landscape.rewards[0, 0] == pytest.approx(1.5)


def test_far_targets_keep_their_reward():
    """The released code's 1e-8 guard pays such a target nothing."""
    critic = torch.zeros(1, 50)
    critic[0, 0] = 500.0
    config = AvataRLConfig.article(top_k=1, threshold="none", reality_weight=0.99, critic_weight=0.01)
    landscape = reward_landscape(torch.zeros(1, 50), critic, torch.tensor([30]), config)
    assert torch.isfinite(landscape.rewards).all()
    assert landscape.rewards[0, 0] > 0


@pytest.mark.parametrize("top_k, least", [(16, 5.3), (4, 21)])
def test_other_actions_earn_only_when_the_critic_insists(top_k, least):
    """docs/method.md: an action needs 9^(7/3) / (n − 1) times the target's probability, with n at most 2K + 1."""
    assert 9 ** (7 / 3) / (2 * top_k) == pytest.approx(least, rel=0.01)

    def paid_to_others(times):
        player = torch.zeros(1, 200, dtype=torch.float64)
        player[0, 100 : 100 + top_k] = 5
        critic = torch.full((1, 200), -300.0, dtype=torch.float64)
        critic[0, 0] = 0.0  # the target
        critic[0, 1] = math.log(times)
        critic[0, 2:top_k] = -200.0
        landscape = reward_landscape(player, critic, torch.tensor([0]), AvataRLConfig.article(top_k=top_k))
        assert landscape.valid.sum() == 2 * top_k
        return landscape.rewards[0, 1:].sum().item()

    needed = 9 ** (7 / 3) / (2 * top_k - 1)
    assert paid_to_others(needed * 0.99) == 0
    assert paid_to_others(needed * 1.01) > 0


def test_the_target_does_not_always_win():
    player, critic = torch.zeros(1, 60), torch.zeros(1, 60)
    critic[0, 1] = 14.0
    landscape = reward_landscape(player, critic, torch.tensor([0]))
    assert landscape.rewards[0].max() > landscape.rewards[0, 0]


def test_scale_has_no_effect_at_the_defaults():
    player, (critic,), targets = random_inputs(vocabulary=60)
    rewards = [
        reward_landscape(player, critic, targets, AvataRLConfig.article(reward_scale=scale)).rewards
        for scale in (100.0, 70.0)
    ]
    assert torch.allclose(*rewards)
    assert torch.allclose(rewards[0].amax(1), torch.full((24,), 1.5, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    player, (critic,), targets = random_inputs(dtype=dtype)
    landscape = reward_landscape(player, critic, targets)
    assert landscape.rewards.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    widened = reward_landscape(player.double(), critic.double(), targets)
    assert torch.allclose(landscape.consensus.double(), widened.consensus, atol=1e-5)
