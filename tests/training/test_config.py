"""Every setting that is out of range is refused by its name, and a saved configuration reads back as itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from avatarl import AvataRLConfig, UserError
from avatarl.models import PlayerConfig
from avatarl.objective import BaselineConfig
from avatarl.training import GuardConfig, OptimConfig, Schedule, ScheduleConfig, TrainConfig

NAN = float("nan")


@pytest.mark.parametrize(
    "field, value",
    [
        ("name", "sgd"),
        ("learning_rate", 0.0),
        ("learning_rate", -1e-3),
        ("learning_rate", NAN),
        ("learning_rate", "fast"),
        ("weight_decay", -0.1),
        ("beta1", 1.0),
        ("beta1", -0.1),
        ("beta2", 1.0),
        ("beta2", float("inf")),
        ("warmup_steps", -1),
        ("warmup_steps", 1.5),
        ("decay", "step"),
        ("final_lr_fraction", 1.1),
        ("final_lr_fraction", -0.1),
        ("clip_norm", 0.0),
        ("clip_norm", -1.0),
    ],
)
def test_an_optimiser_setting_out_of_range_is_named(field: str, value):
    with pytest.raises(UserError, match=f"optim.{field} is .*expected"):
        OptimConfig(**{field: value})


@pytest.mark.parametrize(
    "field, value",
    [
        ("objective", "avatar"),
        ("block_size", 0),
        ("micro_batch_size", 0),
        ("micro_batch_size", 2.0),
        ("gradient_accumulation_steps", 0),
        ("gradient_accumulation_steps", True),
        ("steps", 0),
        ("steps", 1.5),
        ("seed", -1),
        ("seed", 2**64),
        ("precision", "fp16"),
        ("eval_every_steps", 0),
        ("eval_windows", 0),
        ("log_every_steps", 0),
        ("checkpoint_every_steps", 0),
        ("keep_last", 0),
    ],
)
def test_a_setting_out_of_range_is_named(field: str, value):
    with pytest.raises(UserError, match=f"{field} is .*expected"):
        TrainConfig(**{"data": "data", "out": "run", "steps": 1, field: value})


GROUPS = {
    "": TrainConfig(data="data", out="run", steps=1),
    "player.": PlayerConfig(),
    "optim.": OptimConfig(),
    "guard.": GuardConfig(),
    "schedules.": ScheduleConfig(),
    "schedules.smoothing.": Schedule("first", end_step=3),
    "avatarl.": AvataRLConfig(),
    "baseline.": BaselineConfig(),
}


@pytest.mark.parametrize("group, name", [(group, name) for group, of in GROUPS.items() for name in vars(of)])
def test_every_setting_refuses_what_is_of_another_kind(group: str, name: str):
    """A word is true to Python, and a truth is a number."""
    is_flag = isinstance(getattr(GROUPS[group], name), bool)
    for value in ("yes", 1, 0.0, None) if is_flag else (True, False, {7}, object()):
        with pytest.raises(UserError, match=f"{name} is .*expected"):
            made = dataclasses.replace(GROUPS[group], **{name: value})
            ScheduleConfig(smoothing=made)  # which looks at its schedules


@pytest.mark.parametrize("value", [0.0, -1.0, NAN, float("inf")])
def test_epochs_out_of_range_are_named(value: float):
    with pytest.raises(UserError, match="epochs is .*expected"):
        TrainConfig(data="data", out="run", epochs=value)


@pytest.mark.parametrize("both", [{}, {"steps": 1, "epochs": 1.0}])
def test_steps_and_epochs_exclude_each_other(both: dict):
    with pytest.raises(UserError, match="steps is .* and epochs is .*; expected exactly one"):
        TrainConfig(data="data", out="run", **both)


def test_the_nearest_objective_is_suggested():
    with pytest.raises(UserError, match="did you mean 'cross_entropy'"):
        TrainConfig(data="data", out="run", steps=1, objective="cross-entropy")


def test_epochs_become_steps():
    config = TrainConfig(data="data", out="run", epochs=1.5, micro_batch_size=4, gradient_accumulation_steps=2)
    assert config.windows_per_step == 8
    assert config.total_steps(train_windows=80) == 15
    assert config.total_steps(train_windows=1) == 1


def test_paths_become_strings_and_critics_a_list():
    config = TrainConfig(data=Path("data"), out=Path("run"), steps=1, critic=Path("critic"))
    assert (config.data, config.out, config.critic) == ("data", "run", "critic")
    assert config.critics == ["critic"]
    assert TrainConfig(data="data", out="run", steps=1, critic=(Path("a"), "b")).critics == ["a", "b"]
    assert TrainConfig(data="data", out="run", steps=1).critics == []


RICH = TrainConfig(
    data="data",
    out="run",
    objective="ppo",
    critic=["one", "two"],
    avatarl=AvataRLConfig.released(top_p=0.9, critic_weight=(0.1, 0.2), reward_cap=None),
    baseline=BaselineConfig(samples=5, ppo_clip=0.3),
    player=PlayerConfig(
        preset="5m", architecture="qwen3", settings={"attention_dropout": 0.1, "hidden_size": 64, "use_cache": False}
    ),
    optim=OptimConfig(name="muon", learning_rate=1e-5, clip_norm=None, decay="linear"),
    epochs=0.5,
    eval_windows=None,
    precision="bf16",
    compile=True,
    tensorboard=False,
)


@pytest.mark.parametrize("config", [RICH, TrainConfig(data="data", out="run", steps=3)], ids=["rich", "defaults"])
def test_a_saved_configuration_reads_back_as_itself(tmp_path: Path, config: TrainConfig):
    (tmp_path / "config.yaml").write_text(config.as_yaml(), encoding="utf-8")
    assert read_config(tmp_path / "config.yaml") == config


def read_config(path: Path) -> TrainConfig:
    """Read a recipe as the command line does."""
    parser = ArgumentParser()
    parser.add_class_arguments(TrainConfig)
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # its name before 4.49
    return TrainConfig(**instantiate(parser.parse_object(yaml.safe_load(path.read_text(encoding="utf-8")))))
