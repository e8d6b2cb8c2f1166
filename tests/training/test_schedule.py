"""Critics that come, fade and go over the steps of a run, and the player's own average as a critic."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from avatarl import AvataRLConfig, UserError
from avatarl.cli import main
from avatarl.models import Critic, build_player
from avatarl.models.critics import AverageCritic, FrozenModel
from avatarl.objective import BaselineConfig, make_objective
from avatarl.training import Schedule, ScheduleConfig, train
from avatarl.training.optim import Optimisers
from avatarl.training.schedule import Schedules, factor

from ..conftest import BLOCK, TINY_PLAYER
from .runs import Interrupted, assert_same_weights, lines_of, weights_of

FIRST = ScheduleConfig(critic_weight=Schedule("first", end_step=4))


@pytest.mark.parametrize(
    "schedule, expected",
    [
        (Schedule(), [1, 1, 1, 1, 1, 1]),
        (Schedule("first", end_step=2), [1, 1, 0, 0, 0, 0]),
        (Schedule("first", 0.5, end_step=2), [1, 1, 0.5, 0.5, 0.5, 0.5]),
        (Schedule("linear", end_step=4), [1, 0.75, 0.5, 0.25, 0, 0]),
        (Schedule("linear", 0.5, start_step=2, end_step=4), [1, 1, 1, 0.75, 0.5, 0.5]),
        (Schedule("linear"), [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),  # which would be 0 in a seventh
        (Schedule("cosine", end_step=4), [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0, 0]),
        (Schedule("cosine", 3.0, end_step=2), [1, 2, 3, 3, 3, 3]),
    ],
)
def test_factors(schedule: Schedule, expected: list[float]):
    assert [factor(schedule, step, 6) for step in range(1, 7)] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            dict(smoothing=Schedule(end_step=3)),
            "schedules.smoothing.shape is 'constant', so its other settings have no effect",
        ),
        (
            dict(critic_weight=Schedule("fast")),
            "schedules.critic_weight.shape is 'fast'; expected one of 'con",
        ),
        (
            dict(critic_weight=Schedule("linear", 1.5)),
            r"critic_weight.final_fraction is 1.5; expected a number in",
        ),
        (
            dict(smoothing=Schedule("linear", -1)),
            "schedules.smoothing.final_fraction is -1; expected a number",
        ),
        (
            dict(entropy_coef=Schedule("cosine", start_step=-1)),
            "schedules.entropy_coef.start_step is -1; expected a",
        ),
        (
            dict(smoothing=Schedule("linear", start_step=5, end_step=5)),
            "schedules.smoothing.end_step is 5; expected a",
        ),
        (
            dict(critic_weight=Schedule("first")),
            "schedules.critic_weight.end_step is null; shape 'first' needs",
        ),
    ],
)
def test_schedules_that_are_none(settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        ScheduleConfig(**settings)


def test_schedules_that_do_not_fit_the_run(tiny_config, tmp_path: Path):
    late = ScheduleConfig(smoothing=Schedule("linear", end_step=9))
    with pytest.raises(UserError, match="schedules.smoothing.end_step is 9; the run takes 8 steps"):
        train(tiny_config(tmp_path, schedules=late), quiet=True)
    with pytest.raises(UserError, match="critic_weight has no effect: objective 'cross_entropy' uses no critic"):
        train(tiny_config(tmp_path, schedules=FIRST, objective="cross_entropy"), quiet=True)
    for start in (8, 1000):
        never = ScheduleConfig(critic_weight=Schedule("linear", start_step=start))
        with pytest.raises(UserError, match=f"schedules.critic_weight.start_step is {start}; the run takes 8 steps"):
            train(tiny_config(tmp_path, schedules=never), quiet=True)
    high = ScheduleConfig(smoothing=Schedule("linear", 20.0))
    with pytest.raises(
        UserError, match="final_fraction is 20.0, which takes avatarl.smoothing from 0.1 to 2.0; expected"
    ):
        train(tiny_config(tmp_path, schedules=high), quiet=True)
    beta = ScheduleConfig(entropy_coef=Schedule("linear"))
    with pytest.raises(UserError, match="entropy_coef has no effect: objective 'distillation' has no entropy_coef"):
        train(tiny_config(tmp_path, schedules=beta, objective="distillation"), quiet=True)
    with pytest.raises(UserError, match="critic ema:0.9:5 starts after step 5; schedules.critic_weight is 0 by then"):
        train(tiny_config(tmp_path, schedules=FIRST, critic="ema:0.9:5"), quiet=True)
    assert not (tmp_path / "run").exists()


def critics_from(*start_steps: int) -> list[Critic]:
    """Critics that answer after these steps."""
    critics = [Critic(f"from {start}") for start in start_steps]
    for critic, start in zip(critics, start_steps, strict=True):
        critic.start_step = start
    return critics


def test_the_text_has_the_weight_of_critics_that_do_not_answer():
    objective = make_objective("avatarl", AvataRLConfig(critic_weight=(0.2, 0.1)))
    one, other = critics_from(0, 3)
    schedules = Schedules(ScheduleConfig(critic_weight=Schedule("linear", end_step=6)), objective, [one, other], 9)
    stages = [schedules.stage(step).critics for step in (1, 3, 4, 6, 7, 9)]
    assert stages == [(one,), (one,), (one, other), (one, other), (), ()]
    configs = [schedules.stage(step).objective.avatarl for step in (1, 4, 7)]
    assert [config.critic_weight for config in configs] == [(0.2,), (0.2, 0.1), 0.0]
    assert [config.reality_weight for config in configs] == pytest.approx([0.8, 0.7, 1.0])
    assert [schedules.active_steps(critic) for critic in (one, other)] == [6, 3]
    assert schedules.logged(4) == {"critic_weight": pytest.approx(0.15)}
    distillation = make_objective("distillation", baseline=BaselineConfig(distillation_alpha=0.4))
    stage = Schedules(ScheduleConfig(), distillation, critics_from(0, 5), 9).stage(2)
    assert stage.objective.baseline.distillation_alpha == pytest.approx(0.7)


def test_a_critic_first_then_none(tiny_config, tmp_path: Path, monkeypatch):
    """The critic is asked in the first steps and evaluations alone, and its weights are given back."""
    asked = []
    forward = FrozenModel.forward
    monkeypatch.setattr(FrozenModel, "forward", lambda self, ids: asked.append(1) or forward(self, ids))
    common = dict(log_every_steps=1, eval_every_steps=4)
    train(tiny_config(tmp_path / "constant", **common), quiet=True)
    assert len(asked) == 10
    asked.clear()
    summary = train(tiny_config(tmp_path / "first", schedules=FIRST, **common), quiet=True)
    assert len(asked) == 5  # four steps, one evaluation
    constant, first = (lines_of(tmp_path / name / "run") for name in ("constant", "first"))
    for line, expected in zip(first[:5], constant[:5], strict=True):
        assert line["cross_entropy"] == pytest.approx(expected["cross_entropy"], rel=1e-5)
    assert all("critic_wins" in line for line in first[:5]) and not any("critic_wins" in line for line in first[5:])
    assert first[5]["critic_weight"] == 0 and first[6]["cross_entropy"] != constant[6]["cross_entropy"]
    assert [line["critic_flops"] for line in first] == [summary["critic_flops"] * min(x["step"], 4) // 4 for x in first]
    assert summary["critic_flops"] > 0


def test_a_schedule_that_ends_where_it_begins_changes_nothing(tiny_config, tmp_path: Path):
    still = {name: Schedule("linear", 1.0) for name in ("critic_weight", "smoothing", "entropy_coef")}
    train(tiny_config(tmp_path / "still", schedules=ScheduleConfig(**still)), quiet=True)
    train(tiny_config(tmp_path / "constant"), quiet=True)
    for found, expected in zip(*(lines_of(tmp_path / name / "run") for name in ("still", "constant")), strict=True):
        assert {name: found[name] for name in expected if name != "event"} == pytest.approx(
            {name: value for name, value in expected.items() if name != "event"}, rel=1e-5
        )
    assert lines_of(tmp_path / "still" / "run")[0]["smoothing"] == pytest.approx(0.1)


def test_a_line_is_of_steps_of_one_stage(tiny_config, tmp_path: Path, critic_cache: Path):
    """Means of steps with a critic and of steps without one are not mixed, whatever the interval of the log."""
    settings = dict(critic=str(critic_cache), schedules=FIRST)
    train(tiny_config(tmp_path / "often", log_every_steps=1, **settings), quiet=True)
    train(tiny_config(tmp_path / "seldom", log_every_steps=8, **settings), quiet=True)
    often, seldom = ([x for x in lines_of(tmp_path / n / "run") if x["event"] == "train"] for n in ("often", "seldom"))
    assert [line["step"] for line in seldom] == [4, 8]
    assert seldom[0]["active_actions"] == pytest.approx(sum(line["active_actions"] for line in often[:4]) / 4)
    assert "critic_wins" in seldom[0] and "critic_wins" not in seldom[1]


def test_what_is_let_go_is_gone(tiny_config, tmp_path: Path, critic_folder: Path, monkeypatch):
    """The live critic and the average, as weak references see them when the run is at its last step."""
    alive, kept = [], []
    made = FrozenModel.__init__
    monkeypatch.setattr(FrozenModel, "__init__", lambda self, m: made(self, m) or alive.append(weakref.ref(self)))
    step = Optimisers.step

    def look(self, number, *arguments):
        if number == 8:
            gc.collect()
            kept.extend(reference for reference in alive if reference() is not None)
        return step(self, number, *arguments)

    monkeypatch.setattr(Optimisers, "step", look)
    train(tiny_config(tmp_path, critic=[str(critic_folder), "ema:0.5:1"], schedules=FIRST), quiet=True)
    assert len(alive) == 2 and not kept


@pytest.mark.parametrize("name", ["smoothing", "entropy_coef", "critic_weight"])
def test_each_schedule_changes_the_run(tiny_config, tmp_path: Path, name: str):
    schedules = ScheduleConfig(**{name: Schedule("linear", 0.2)})
    train(tiny_config(tmp_path / "falls", schedules=schedules), quiet=True)
    train(tiny_config(tmp_path / "constant"), quiet=True)
    falls, constant = (lines_of(tmp_path / folder / "run") for folder in ("falls", "constant"))
    assert falls[-1]["loss"] != pytest.approx(constant[-1]["loss"], rel=1e-4)
    settings = {"smoothing": 0.1, "entropy_coef": 0.01, "critic_weight": 0.3}
    assert falls[-2][name] == pytest.approx(settings[name] * (1 - 0.8 * 7 / 8))


# --- the player's own average ----------------------------------------------------------------------------------------


def test_the_average_by_hand(tokenizer):
    players = [build_player(TINY_PLAYER, tokenizer, BLOCK, seed=seed) for seed in range(4)]
    average = AverageCritic("ema:0.75:1", build_player(TINY_PLAYER, tokenizer, BLOCK, seed=9))
    for step, player in enumerate(players):
        average.update(player, step)
    found, weights = average.model.state_dict(), [player.state_dict() for player in players]
    for name, mean in found.items():
        expected = 0.75 * (0.75 * weights[1][name] + 0.25 * weights[2][name]) + 0.25 * weights[3][name]
        torch.testing.assert_close(mean, expected)
    assert not any(parameter.requires_grad for parameter in average.model.parameters())


def test_a_player_judged_by_its_own_average(tiny_config, tmp_path: Path):
    config = tiny_config(tmp_path, critic="ema:0.5:3", log_every_steps=1)
    summary = train(config, quiet=True)
    lines = lines_of(tmp_path / "run")
    steps = [line["step"] for line in lines if line["event"] == "train" and "critic_wins" in line]
    assert steps == [4, 5, 6, 7, 8]  # from the step after the start step
    weights = {line["step"]: line["critic_weight"] for line in lines if line["event"] == "train"}
    assert weights[3] == 0 and weights[4] == pytest.approx(0.3)
    per_token = summary["player_flops"] / 3 / summary["tokens"]
    assert summary["critic_flops"] == pytest.approx(per_token * 5 * config.windows_per_step * config.block_size)
    spent = [line["critic_flops"] for line in lines if line["event"] == "train"]
    assert spent == [summary["critic_flops"] * judged // 5 for judged in (0, 0, 0, 1, 2, 3, 4, 5)]
    other = tiny_config(tmp_path / "other", critic="ema:0.9:3", log_every_steps=1)
    train(other, quiet=True)
    assert lines_of(tmp_path / "other" / "run")[:4] == lines[:4] and lines_of(tmp_path / "other" / "run") != lines
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-00000008" / "average0.safetensors")
    assert saved.keys() == load_file(tmp_path / "run" / "checkpoints" / "step-00000008" / "player.safetensors").keys()


@pytest.mark.parametrize(
    "name, message",
    [
        ("ema:1.0:5", "critic is 'ema:1.0:5'; expected ema:DECAY:START_STEP, as ema:0.999:500, with a decay below 1"),
        ("ema:0.9", "critic is 'ema:0.9'; expected ema:DECAY:START_STEP"),
        ("ema:0.9:8", "critic ema:0.9:8 starts after step 8; the run takes 8 steps"),
    ],
)
def test_averages_that_cannot_be(tiny_config, tmp_path: Path, name: str, message: str):
    with pytest.raises(UserError, match=message):
        train(tiny_config(tmp_path, critic=name), quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("interrupted_in", [3, 5, 8])
def test_resuming_in_every_stage(tiny_config, tmp_path: Path, critic_folder: Path, interrupt, interrupted_in: int):
    """Two critics, one of them an average from step 2 on; both are forgotten after step 6."""
    settings = dict(
        critic=[str(critic_folder), "ema:0.5:2"],
        schedules=ScheduleConfig(critic_weight=Schedule("cosine", end_step=6), smoothing=Schedule("linear")),
        checkpoint_every_steps=1,
        steps=10,
        log_every_steps=3,
    )
    train(tiny_config(tmp_path / "whole", **settings), quiet=True)
    interrupt(interrupted_in)
    with pytest.raises(Interrupted):
        train(tiny_config(tmp_path, **settings), quiet=True)
    train(tiny_config(tmp_path, **settings), resume=True, quiet=True)
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole" / "run")
    assert_same_weights(*(weights_of(folder / "run" / "final") for folder in (tmp_path, tmp_path / "whole")))


@pytest.mark.parametrize("before, goes_on_from", [("ema:0.5:6", "player"), ("ema:0.5:2", "average0")])
def test_an_average_under_other_settings(tiny_config, tmp_path: Path, interrupt, before: str, goes_on_from: str):
    """One that should have begun by now begins with the player as it is; one that has goes on at its new pace."""
    interrupt(5)
    with pytest.raises(Interrupted):
        train(tiny_config(tmp_path, critic=before, checkpoint_every_steps=1), quiet=True)
    interrupt(2)
    with pytest.raises(Interrupted):
        changed = tiny_config(tmp_path, critic="ema:0.75:3", checkpoint_every_steps=1)
        train(changed, resume=True, allow_changes=True, quiet=True)
    at_4, at_5 = (tmp_path / "run" / "checkpoints" / f"step-0000000{step}" for step in (4, 5))
    start, player = load_file(at_4 / f"{goes_on_from}.safetensors"), load_file(at_5 / "player.safetensors")
    for name, mean in load_file(at_5 / "average0.safetensors").items():
        torch.testing.assert_close(mean, 0.75 * start[name] + 0.25 * player[name])


def test_an_average_may_begin_with_the_first_player(tiny_config, tmp_path: Path, tokenizer):
    config = tiny_config(tmp_path, critic="ema:0.75:0", checkpoint_every_steps=1, steps=1)
    train(config, quiet=True)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    start = build_player(config.player, tokenizer, BLOCK, config.seed).state_dict()
    player = load_file(checkpoint / "player.safetensors")
    for name, mean in load_file(checkpoint / "average0.safetensors").items():
        torch.testing.assert_close(mean, 0.75 * start[name] + 0.25 * player[name])


def test_a_recipe_holds_schedules(tiny_config, tmp_path: Path):
    """What config.yaml says is what the command line takes."""
    config = tiny_config(tmp_path, schedules=FIRST, critic="ema:0.9:2", steps=6)
    (tmp_path / "recipe.yaml").write_text(config.as_yaml())
    assert main(["train", "--config", str(tmp_path / "recipe.yaml"), "--schedules.critic_weight.end_step", "5"]) == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["critic"] == "ema:0.9:2"
    first = {"shape": "first", "final_fraction": 0.0, "start_step": 0, "end_step": 5}
    assert saved["schedules"]["critic_weight"] == first
