"""A plan's arithmetic adds up, it says what it assumes, and refuses what cannot be planned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from avatarl import UserError
from avatarl.data import PreparedData
from avatarl.models import PlayerConfig
from avatarl.planning import UTILISATION, Plan, measure_flops, plan, plan_table
from avatarl.training import OptimConfig, Schedule, ScheduleConfig


@pytest.fixture(autouse=True)
def no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast this machine multiplies does not matter here."""
    monkeypatch.setattr("avatarl.planning.measure_flops", lambda *_: 1e11)


def on_gpus(tiny_config, tmp_path: Path, processes: int, **overrides) -> Plan:
    """A plan of eight windows a step on that many H100."""
    return plan(tiny_config(tmp_path, device="H100", gradient_accumulation_steps=2, **overrides), processes)


def test_fsdp_divides_what_ddp_repeats(tiny_config, tmp_path: Path):
    whole = on_gpus(tiny_config, tmp_path, 2).memory
    divided = on_gpus(tiny_config, tmp_path, 2, parallel="fsdp").memory
    for part in ("weights", "optimiser state"):
        assert divided[part] == pytest.approx(whole[part] / 2, abs=1)
    assert divided["gathered layers"] > 0 and "gathered layers" not in whole
    assert divided["critics"] == whole["critics"]
    shared = on_gpus(tiny_config, tmp_path, 2, parallel="fsdp", shard_critics=True).memory
    assert shared["critics"] == pytest.approx(whole["critics"] / 2, abs=1)
    assert shared["gathered layers"] > divided["gathered layers"]


def test_processes_share_the_windows_of_a_step(tiny_config, tmp_path: Path):
    one, two, eight = (on_gpus(tiny_config, tmp_path, processes) for processes in (1, 2, 8))
    assert [(x.windows, x.micro_batches) for x in (one, two, eight)] == [(4, 2), (4, 1), (1, 1)]
    assert one.flops == two.flops == eight.flops
    assert eight.tokens_per_second == pytest.approx(8 * one.tokens_per_second)
    assert eight.memory["player's activations"] < one.memory["player's activations"]
    with pytest.raises(UserError, match="8, which 3 processes cannot share"):
        on_gpus(tiny_config, tmp_path, 3)


def test_processes_on_a_cpu_share_it(tiny_config, tmp_path: Path):
    config = tiny_config(tmp_path, micro_batch_size=2, gradient_accumulation_steps=2)
    one, two = plan(config), plan(config, processes=2)
    assert two.tokens_per_second == pytest.approx(one.tokens_per_second)
    assert two.needed_memory > 1.9 * one.needed_memory


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_gradients_and_copies_are_held_in_their_phases(tiny_config, tmp_path: Path, name: str, accumulates: bool):
    config = tiny_config(tmp_path, optim=OptimConfig(name=name), gradient_accumulation_steps=1 + accumulates)
    planned = plan(config)
    weights, matrices = planned.player.weights, planned.player.matrices
    held = {phase: parts["gradients"] for phase, parts in planned.phases.items()}
    early = weights if accumulates else 0
    assert held == {"forward": early, "loss": early, "backward": weights, "optimiser": weights}
    assert planned.phases["optimiser"]["temporaries"] == (2 * matrices if name == "muon" else 0)
    assert planned.memory["optimiser state"] == 2 * weights - (matrices if name == "muon" else 0)
    assert planned.total_memory == max(sum(parts.values()) for parts in planned.phases.values())


def test_what_does_not_fit_is_said(tiny_config, tmp_path: Path):
    large = {"player": PlayerConfig("30m"), "block_size": 1024, "micro_batch_size": 128, "critic": "random:1m:1"}
    planned = plan(tiny_config(tmp_path, device="T4", **large))
    assert not planned.fits
    assert "DOES NOT FIT in 14.60 GiB" in plan_table(planned)
    fitting = plan(tiny_config(tmp_path, device="T4", **{**large, "micro_batch_size": 1}))
    assert fitting.fits and "fits in 14.60 GiB" in plan_table(fitting)


def test_time_is_flops_by_speed(tiny_config, tmp_path: Path):
    planned = on_gpus(tiny_config, tmp_path, 2, precision="bf16")
    seconds = sum(planned.flops.values()) / (2 * 989e12 * UTILISATION)
    assert planned.hours == pytest.approx(seconds / 3600)
    config = tiny_config(tmp_path, device="h100", precision="bf16")
    assert plan(config, utilisation=0.15).hours == pytest.approx(2 * plan(config).hours)


def test_automatic_precision_is_that_of_the_device(tiny_config, tmp_path: Path):
    precisions = [plan(tiny_config(tmp_path, device=gpu, precision="auto")).precision for gpu in ("H100", "T4")]
    assert precisions == ["bf16", "fp32"]


def test_a_measured_device_is_said_to_be_measured(tiny_config, tmp_path: Path):
    planned = plan(tiny_config(tmp_path))
    assert planned.hardware.memory > 0
    assert "0.1 TFLOP/s (a large product, timed now)" in plan_table(planned)
    assert measure_flops(torch.device("cpu"), "fp32", seconds=0) > 1e8


@pytest.mark.parametrize(
    "every, last, also, steps, kept", [(4, 2, None, 10, 2), (4, 1, 4, 10, 3), (4, 9, 8, 10, 3), (100, 2, None, 10, 1)]
)
def test_checkpoints_that_stay(tiny_config, tmp_path: Path, every, last, also, steps, kept: int):
    config = tiny_config(tmp_path, steps=steps, checkpoint_every_steps=every, keep_last=last, keep_every=also)
    assert plan(config).checkpoints == kept


def test_a_copy_for_the_background_is_held_in_a_cpus_memory(tiny_config, tmp_path: Path):
    copy = plan(tiny_config(tmp_path, checkpoint_in_background=True)).memory["checkpoint's copy"]
    assert copy == plan(tiny_config(tmp_path)).checkpoint
    assert "checkpoint's copy" not in on_gpus(tiny_config, tmp_path, 1, checkpoint_in_background=True).memory


# --- what is not there ---------------------------------------------------------------------------------------------


def test_data_and_critic_need_not_exist(tiny_config, tmp_path: Path):
    config = tiny_config(tmp_path, data=tmp_path / "nothing", critic=str(tmp_path / "no-critic"))
    planned = plan(config)
    assert "assuming 50,257 tokens" in plan_table(planned) and "ARE NOT COUNTED" in plan_table(planned)
    named = plan(config, vocab_size=1000, critic_preset="5m")
    assert "NOT COUNTED" not in plan_table(named) and "assuming a player of preset 5m" in plan_table(named)
    assert planned.critic_share == 0 and named.critic_share > 0.5
    assert list(tmp_path.iterdir()) == []  # a plan writes nothing


def test_a_critic_may_be_what_another_recipe_makes(tiny_config, tmp_path: Path):
    (tmp_path / "critic.yaml").write_text("out: runs/critic\nplayer: {preset: 5m}\n")
    (tmp_path / "another.yaml").write_text("- not a recipe\n")
    config = tiny_config(tmp_path, critic="runs/critic")
    planned = plan(config, recipe=tmp_path / "player.yaml")
    assert any("assuming what" in warning and "critic.yaml" in warning for warning in planned.warnings)
    assert planned.flops == plan(config, critic_preset="5m").flops


def test_a_random_critic_costs_what_its_preset_does(tiny_config, tmp_path: Path):
    drawn = plan(tiny_config(tmp_path, critic="random:1m:7"))
    named = plan(tiny_config(tmp_path, critic="absent/critic"), critic_preset="1m")
    assert drawn.flops == named.flops and not drawn.warnings
    with pytest.raises(UserError, match="expected random:PRESET:SEED"):
        plan(tiny_config(tmp_path, critic="random:1m"))


def test_a_cached_critic_costs_no_forward_pass(tiny_config, tmp_path: Path, critic_cache: Path):
    live, cached = plan(tiny_config(tmp_path)), plan(tiny_config(tmp_path, critic=str(critic_cache)))
    assert live.flops["critic"] > 0 and cached.flops["critic"] == 0
    assert not any(parts.get("critics' activations", 0) for parts in cached.phases.values())
    assert cached.memory["critics"] == 0 and not cached.warnings
    twin = plan(tiny_config(tmp_path, objective="cross_entropy"))
    assert cached.flops == twin.flops and cached.total_memory > twin.total_memory  # what is read of the cache


def test_an_average_is_another_player(tiny_config, tmp_path: Path):
    planned, twin = (
        plan(tiny_config(tmp_path, **run)) for run in (dict(critic="ema:0.9:2"), dict(critic="random:1m:7"))
    )
    assert planned.flops["critic"] == pytest.approx(planned.flops["player"] / 3 * 6 / 8)  # from step 3 of 8 on
    assert planned.memory["critics"] == planned.memory["weights"]
    assert planned.checkpoint == twin.checkpoint + planned.model_folder


def test_a_critic_that_is_let_go_costs_less(tiny_config, tmp_path: Path):
    schedules = ScheduleConfig(critic_weight=Schedule("first", end_step=2))
    first, constant = (plan(tiny_config(tmp_path, **run)) for run in (dict(schedules=schedules), {}))
    assert first.flops["critic"] == constant.flops["critic"] / 4 > 0


@pytest.mark.parametrize(
    "overrides, options, message",
    [
        ({"steps": None, "epochs": 2, "data": "absent"}, {}, "epochs is 2, and absent does not exist"),
        ({}, {"vocab_size": 7}, "vocab_size is 7, but .* has 300"),
        ({}, {"critic_preset": "2m"}, "critic_preset is '2m'"),
        ({}, {"utilisation": 1.5}, "utilisation is 1.5; expected a number above 0 and at most 1"),
        ({}, {"processes": 0}, "processes is 0"),
        ({"device": "H10"}, {}, "device is 'H10'; expected one of auto, cpu.*did you mean 'H100'"),
        ({"device": "T4", "precision": "bf16"}, {}, "precision is 'bf16', which T4"),
        ({"critic": None}, {}, "needs a critic"),
        ({"player": PlayerConfig(settings={"hiden_size": 8})}, {}, "did you mean 'hidden_size'"),
        ({"player": PlayerConfig("1m", architecture="mixtral")}, {}, "'mixtral' .*cannot be planned"),
        ({"player": PlayerConfig("1m", architecture="codegen")}, {}, "'codegen' with player.settings .*cannot be"),
        (
            {"player": PlayerConfig(architecture="gpt2", settings={"n_embd": 15})},
            {},
            "'gpt2' with player.settings .*cannot be planned",
        ),
    ],
)
def test_mistakes_are_said_in_one_line(tiny_config, tmp_path: Path, overrides: dict, options: dict, message: str):
    with pytest.raises(UserError, match=message) as refusal:
        plan(tiny_config(tmp_path, **overrides), **options)
    assert "\n" not in str(refusal.value)


def test_epochs_are_counted_in_the_data(tiny_config, data_folder: Path, tmp_path: Path):
    windows = (len(PreparedData.open(data_folder).train) - 1) // 16
    planned = plan(tiny_config(tmp_path, steps=None, epochs=2))
    assert planned.steps == round(2 * windows / 4)
    assert planned.tokens == planned.steps * 4 * 16
