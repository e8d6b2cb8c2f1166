"""Settings: presets, ranges, and that each of them does something."""

import dataclasses
import math

import pytest
import torch

from avatarl import AvataRLConfig, UserError, avatarl_loss
from avatarl.objective import OBJECTIVES, BaselineConfig, make_objective, objective_loss

from .cases import random_inputs

ARTICLE = dict(
    top_k=16,
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
    entropy_coef=0.01,
    temperature=1.0,
    per_action_mean=False,
    player_proposes=True,
)
RELEASED = ARTICLE | dict(top_k=4, threshold="mass", entropy_coef=0.0, temperature=1.01, per_action_mean=True)

DENSE = ARTICLE | dict(
    pool="arithmetic",
    tail="dense",
    smoothing=0.0,
    reality_weight=0.2,
    critic_weight=0.8,
    reward_scale=1.0,
    threshold="none",
    reward_cap=None,
    entropy_coef=0.0,
)


def test_presets_are_the_table_of_the_method():
    assert dataclasses.asdict(AvataRLConfig()) == dataclasses.asdict(AvataRLConfig.article()) == ARTICLE
    assert dataclasses.asdict(AvataRLConfig.released()) == RELEASED
    assert dataclasses.asdict(AvataRLConfig.dense()) == DENSE


def test_baseline_defaults():
    assert dataclasses.asdict(BaselineConfig()) == dict(
        label_smoothing=0.1, distillation_alpha=0.5, samples=16, ppo_clip=0.2, ppo_refresh_every=4
    )


@pytest.mark.parametrize("preset, settings", [("article", ARTICLE), ("released", RELEASED), ("dense", DENSE)])
def test_presets_take_overrides(preset, settings):
    changes = dict(top_k=64, threshold="none", entropy_coef=0.5)
    config = getattr(AvataRLConfig, preset)(**changes)
    assert dataclasses.asdict(config) == settings | changes
    with pytest.raises(TypeError, match="topk"):
        getattr(AvataRLConfig, preset)(topk=3)


@pytest.mark.parametrize("config, field", [(AvataRLConfig(), "top_k"), (BaselineConfig(), "samples")])
def test_settings_cannot_be_changed(config, field):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, field, 3)
    assert hash(config) == hash(type(config)())


# field, refused value, what the message says is accepted
REFUSED = [
    *[("top_k", value, "a whole number of at least 1") for value in (0, -1, 2.0, "4", None, True)],
    *[("top_p", value, r"a number in \(0, 1\], or null") for value in (0, 0.0, -0.1, 1.1, math.nan, "0.9", False)],
    *[("smoothing", value, r"a number in \[0, 1\)") for value in (-0.1, 1, 1.0, math.nan, None, "0.1")],
    *[("pool", value, "'geometric', 'arithmetic'") for value in ("linear", "", None, 1)],
    *[("tail", value, "'renormalise', 'target', 'sample', 'dense'") for value in ("drop", "", 1)],
    *[("tail_samples", value, "a whole number of at least 1") for value in (0, -1, 2.0, None)],
    *[("reality_weight", value, "a number of at least 0") for value in (-0.1, math.inf, math.nan, None, True)],
    *[("critic_weight", value, "at least 0, or one per critic") for value in (-0.1, math.inf, math.nan, None, "0.3")],
    *[("reward_scale", value, "a number above 0") for value in (0, -1.0, math.inf, math.nan, None)],
    *[("threshold", value, "'mean', 'mass', 'none'") for value in ("median", None, 0.5)],
    *[("reward_cap", value, "a number above 0, or null") for value in (0, -1.5, math.inf, math.nan, "1.5")],
    *[("entropy_coef", value, "a number of at least 0") for value in (-0.01, math.inf, math.nan, None)],
    *[("temperature", value, "a number above 0") for value in (0, -1.0, math.inf, math.nan, None)],
    *[("per_action_mean", value, "True, False") for value in ("no", None, 2)],
    *[("player_proposes", value, "True, False") for value in ("no", None, 2)],
]
REFUSED_BASELINE = [
    *[("label_smoothing", value, r"a number in \[0, 1\)") for value in (-0.1, 1.0, math.nan, None)],
    *[("distillation_alpha", value, r"a number in \[0, 1\]") for value in (-0.1, 1.1, math.nan, None)],
    *[("samples", value, "a whole number of at least 1") for value in (0, -1, 1.5, None, True)],
    *[("ppo_clip", value, r"a number in \(0, 1\)") for value in (0, 1.0, -0.2, math.nan, None)],
    *[("ppo_refresh_every", value, "a whole number of at least 1") for value in (0, -1, 1.5, None)],
]


@pytest.mark.parametrize(
    "kind, field, value, accepted",
    [(AvataRLConfig, *case) for case in REFUSED] + [(BaselineConfig, *case) for case in REFUSED_BASELINE],
)
def test_refused_values_are_named_with_what_is_accepted(kind, field, value, accepted):
    with pytest.raises(UserError, match=accepted) as refusal:
        kind(**{field: value})
    assert f"{field} is {value!r}; expected " in str(refusal.value)
    assert isinstance(refusal.value, ValueError)


def test_every_setting_has_refused_values():
    for kind, cases in ((AvataRLConfig, REFUSED), (BaselineConfig, REFUSED_BASELINE)):
        assert {case[0] for case in cases} == {field.name for field in dataclasses.fields(kind)}


@pytest.mark.parametrize(
    "accepted",
    [
        dict(top_k=1, smoothing=0, top_p=1, reward_cap=1, temperature=1),
        dict(smoothing=0.999, top_p=1e-9, reward_cap=None, entropy_coef=0),
        dict(reality_weight=0.0, critic_weight=1.0),
        dict(critic_weight=0),
        dict(reality_weight=3.0, critic_weight=2.0),  # the geometric pool's weights need not sum to 1
        dict(pool="arithmetic", threshold="none"),
        dict(pool="arithmetic", threshold="mean", tail="renormalise"),
        dict(pool="geometric", tail="target"),
        dict(pool="arithmetic", threshold="none", tail="dense"),
        dict(pool="arithmetic", threshold="none", tail="sample", tail_samples=1),
    ],
)
def test_the_ends_of_the_ranges_are_accepted(accepted):
    AvataRLConfig(**accepted)


def test_a_list_becomes_a_tuple():
    config = AvataRLConfig(critic_weight=[0.2, 0.1])
    assert config.critic_weight == (0.2, 0.1) and hash(config) == hash(AvataRLConfig(critic_weight=(0.2, 0.1)))
    with pytest.raises(UserError, match="critic_weight is -0.1"):
        AvataRLConfig(critic_weight=[0.2, -0.1])


def test_weights_for_a_number_of_critics():
    assert AvataRLConfig().critic_weights(2) == (0.15, 0.15)
    assert AvataRLConfig(critic_weight=(0.2, 0.1)).critic_weights(2) == (0.2, 0.1)
    assert AvataRLConfig(critic_weight=0.0).critic_weights(0) == ()
    with pytest.raises(UserError, match="2 entries for 3 critics"):
        AvataRLConfig(critic_weight=(0.2, 0.1)).critic_weights(3)
    with pytest.raises(UserError, match="critic_weight is 0.3 but no critic is given"):
        AvataRLConfig().critic_weights(0)


def test_weights_that_do_not_go_together():
    with pytest.raises(UserError, match="reality_weight and critic_weight are both 0"):
        AvataRLConfig(reality_weight=0, critic_weight=(0, 0))
    with pytest.raises(UserError, match=r"reality_weight \+ critic_weight must be 1; found 0.7 \+ 0.2"):
        AvataRLConfig(pool="arithmetic", critic_weight=0.2)
    with pytest.raises(UserError, match=r"must be 1; found 0.7 \+ \(0.2, 0.2\)"):
        AvataRLConfig(pool="arithmetic", critic_weight=[0.2, 0.2])
    AvataRLConfig(pool="arithmetic", critic_weight=[0.2, 0.1])
    with pytest.raises(UserError, match="threshold='mass' is defined for pool='geometric' only; use 'mean' or 'none'"):
        AvataRLConfig(pool="arithmetic", threshold="mass")


def test_the_tail_is_by_default_that_of_the_pool():
    assert AvataRLConfig().tail_rule == "renormalise"
    assert AvataRLConfig(pool="arithmetic").tail_rule == "target"
    assert dataclasses.replace(AvataRLConfig(), pool="arithmetic").tail_rule == "target"
    assert AvataRLConfig(pool="arithmetic", tail="renormalise").tail_rule == "renormalise"


@pytest.mark.parametrize("tail", ["sample", "dense"])
def test_a_tail_outside_of_the_actions_asks_for_a_sum_of_all_that_is_believed(tail):
    linear = dict(pool="arithmetic", threshold="none", tail=tail)
    needed = f"tail='{tail}' keeps all .* it needs pool='arithmetic' and threshold='none'; found "
    with pytest.raises(UserError, match=f"{needed}'geometric' and 'none'"):
        AvataRLConfig(**linear | dict(pool="geometric"))
    with pytest.raises(UserError, match=f"{needed}'arithmetic' and 'mean'"):
        AvataRLConfig(**linear | dict(threshold="mean"))
    with pytest.raises(UserError, match="per_action_mean divides by the active actions"):
        AvataRLConfig(**linear, per_action_mean=True)
    with pytest.raises(UserError, match="threshold='mass' is defined for tail='renormalise' only; found 'target'"):
        AvataRLConfig(threshold="mass", tail="target")


@pytest.mark.parametrize("name, nearest", [("avatrl", "avatarl"), ("cross-entropy", "cross_entropy"), ("PPO!", None)])
def test_unknown_objective(name, nearest):
    with pytest.raises(UserError, match=f"objective is '{name}'; expected one of avatarl, ") as refusal:
        make_objective(name)
    assert all(known in str(refusal.value) for known in OBJECTIVES)
    assert str(refusal.value).endswith(f"; did you mean '{nearest}'?") == (nearest is not None)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_objectives_are_found_by_name(name):
    config, baseline = AvataRLConfig(top_k=3), BaselineConfig(samples=2)
    objective = make_objective(name, config, baseline)
    assert objective.name == name and objective.avatarl is config and objective.baseline is baseline
    assert make_objective(name).avatarl == AvataRLConfig.article()


# Each setting, and another value for it than BASE has.
BASE = AvataRLConfig(top_k=4, threshold="none", reward_cap=1.5)
CHANGES = dict(
    top_k=5,
    player_proposes=False,
    top_p=0.5,
    smoothing=0.2,
    pool="arithmetic",
    tail="target",
    tail_samples=5,
    reality_weight=0.6,
    critic_weight=0.4,
    reward_scale=2.5,
    threshold="mean",
    reward_cap=None,
    entropy_coef=0.0,
    temperature=1.01,
    per_action_mean=True,
)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(AvataRLConfig)])
def test_each_setting_changes_loss_and_gradient(field):
    # A scale that the cap binds for at some positions only, so that scale and cap are both seen.
    base = dataclasses.replace(BASE, reward_scale=3.0)
    if field == "tail_samples":
        base = dataclasses.replace(base, pool="arithmetic", tail="sample")
    results = []
    for config in (base, dataclasses.replace(base, **{field: CHANGES[field]})):
        player, critics, targets = random_inputs()
        draws = torch.full((len(targets), 1), 0.3, dtype=torch.float64)
        loss, _ = avatarl_loss(player, critics[0], targets, config, uniforms=draws)
        loss.backward()
        results.append((loss.item(), player.grad))
    assert results[0][0] != pytest.approx(results[1][0], rel=1e-4)
    assert (results[0][1] - results[1][1]).abs().max() > 1e-4 * results[0][1].abs().max()


def test_each_threshold_is_another_rule():
    player, critics, targets = random_inputs()
    losses = {
        threshold: avatarl_loss(player, critics[0], targets, AvataRLConfig(top_k=4, threshold=threshold))[0].item()
        for threshold in ("mean", "mass", "none")
    }
    assert len(set(losses.values())) == 3


def test_weights_of_single_critics_matter():
    player, critics, targets = random_inputs(critics=2)
    configs = [AvataRLConfig(top_k=4, threshold="none", critic_weight=w) for w in (0.3, (0.2, 0.1), (0.1, 0.2))]
    assert len({avatarl_loss(player, critics, targets, config)[0].item() for config in configs}) == 3


BASELINE_CHANGES = {  # ppo_refresh_every is the trainer's: tests/training
    "label_smoothing": ("label_smoothing", 0.2),
    "distillation_alpha": ("distillation", 0.6),
    "samples": ("reinforce", 5),
    "ppo_clip": ("ppo", 0.05),
}


@pytest.mark.parametrize("field", BASELINE_CHANGES)
def test_each_baseline_setting_changes_the_gradient(field):
    name, value = BASELINE_CHANGES[field]
    results = []
    for baseline in (BaselineConfig(samples=8), BaselineConfig(**{"samples": 8, field: value})):
        player, critics, targets = random_inputs()
        objective, extra = make_objective(name, BASE, baseline), {}
        draws = torch.rand(24, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        if objective.num_uniforms:
            extra["uniforms"] = draws[:, : objective.num_uniforms]
        if objective.needs_snapshot:
            extra["snapshot_logits"] = player.detach() * 0.8
        objective_loss(objective, player, critics, targets, **extra)[0].backward()
        results.append(player.grad)
    assert (results[0] - results[1]).abs().max() > 1e-3 * results[0].abs().max()
