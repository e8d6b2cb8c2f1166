"""A run after an interruption: the same to the bit, or refused by the name of what has changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from avatarl import AvataRLConfig, UserError
from avatarl.data.prepare import prepare
from avatarl.errors import RunFailed
from avatarl.models import PlayerConfig
from avatarl.objective import OBJECTIVES
from avatarl.run_dir.identity import changed_identity, settings_digest
from avatarl.training import OptimConfig, TrainConfig, train
from avatarl.training.resume import check_run_folder
from avatarl.training.validation import Validation

from ..conftest import TINY, write_documents
from .runs import Interrupted, assert_same_weights, contents_of, lines_of, weights_of, with_dropout


def test_the_same_seed_gives_the_same_run(tiny_config, tmp_path: Path):
    for name in ("first", "second"):
        torch.manual_seed(len(name))  # whatever the process did before
        train(tiny_config(tmp_path / name, objective="reinforce", player=with_dropout()), quiet=True)
    assert lines_of(tmp_path / "first" / "run") == lines_of(tmp_path / "second" / "run")
    assert_same_weights(*(weights_of(tmp_path / name / "run" / "final") for name in ("first", "second")))


@pytest.mark.parametrize("gradient_accumulation_steps", [1, 2])
@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_a_resumed_run_equals_the_uninterrupted_one(
    tiny_config, tmp_path: Path, interrupt, objective: str, gradient_accumulation_steps: int
):
    """With dropout; the checkpoint lies inside an interval of the log, the interruption after it."""
    settings = dict(
        objective=objective,
        player=with_dropout(),
        micro_batch_size=2,
        gradient_accumulation_steps=gradient_accumulation_steps,
        log_every_steps=3,
        steps=10,
    )
    whole, parts = tiny_config(tmp_path / "whole", **settings), tiny_config(tmp_path / "parts", **settings)
    summary = train(whole, quiet=True)
    interrupt(8)
    with pytest.raises(Interrupted):
        train(parts, quiet=True)
    run = tmp_path / "parts" / "run"
    assert lines_of(run)[-1]["step"] == 6  # two steps after the checkpoint: taken again, and not to be there twice
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "st')  # torn
    resumed = train(parts, resume=True, quiet=True)

    assert lines_of(run) == lines_of(tmp_path / "whole" / "run")
    for folder in ("player", "final"):
        assert_same_weights(weights_of(run / folder), weights_of(tmp_path / "whole" / "run" / folder))
    assert {**resumed, "seconds": 0} == {**summary, "seconds": 0}
    assert resumed["seconds"] > 0


def test_resuming_where_no_checkpoint_was_completed_starts_at_step_0(tiny_config, tmp_path: Path, interrupt):
    train(tiny_config(tmp_path / "whole"), quiet=True)
    interrupt(3)
    with pytest.raises(Interrupted):
        train(tiny_config(tmp_path), quiet=True)
    assert lines_of(tmp_path / "run")
    torn = tmp_path / "run" / "checkpoints" / ".step-00000004.partial"
    torn.mkdir(parents=True)
    (torn / "player.safetensors").write_bytes(b"half")
    train(tiny_config(tmp_path), resume=True, quiet=True)
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole" / "run")
    assert not torn.exists()


def test_resuming_in_a_new_folder_starts_at_step_0(tiny_config, tmp_path: Path):
    assert train(tiny_config(tmp_path, steps=2), resume=True, quiet=True)["steps"] == 2


def test_resuming_a_finished_run_changes_nothing(tiny_config, tmp_path: Path):
    config = tiny_config(tmp_path, tensorboard=True)
    summary = train(config, quiet=True)
    before = contents_of(tmp_path / "run")
    again = train(config, resume=True, quiet=True)
    assert contents_of(tmp_path / "run") == before
    assert again == summary


def test_resuming_under_other_settings_is_refused_by_their_names(tiny_config, tmp_path: Path):
    train(tiny_config(tmp_path), quiet=True)
    before = contents_of(tmp_path / "run")
    changed = tiny_config(
        tmp_path,
        steps=9,
        optim=OptimConfig(learning_rate=2e-2, warmup_steps=2),
        avatarl=AvataRLConfig(top_k=5, threshold="none"),
    )
    with pytest.raises(UserError) as refusal:
        train(changed, resume=True, quiet=True)
    assert str(refusal.value).endswith(
        "other settings: avatarl.top_k was 4 and is 5; optim.learning_rate was 0.01 and is 0.02; steps was 8 and is 9. "
        "Pass --allow_changes to resume anyway"
    )
    assert contents_of(tmp_path / "run") == before


def test_a_moved_run_may_be_resumed(tiny_config, tmp_path: Path, interrupt):
    interrupt(6)
    with pytest.raises(Interrupted):
        train(tiny_config(tmp_path), quiet=True)
    (tmp_path / "run").rename(tmp_path / "moved")
    config = TrainConfig(**{**vars(tiny_config(tmp_path)), "out": str(tmp_path / "moved")})
    assert train(config, resume=True, quiet=True)["steps"] == 8


def test_resuming_on_other_data_is_refused(tiny_config, tmp_path: Path, data_folder: Path, interrupt, monkeypatch):
    shutil.copytree(data_folder, tmp_path / "data")
    interrupt(6)
    with pytest.raises(Interrupted):
        train(tiny_config(tmp_path, data=str(tmp_path / "data")), quiet=True)
    shutil.rmtree(tmp_path / "data")
    source = write_documents(tmp_path / "documents.jsonl", count=60, seed=2)
    prepare([str(source)], tmp_path / "data", tokenizer=str(data_folder / "tokenizer"), quiet=True)
    config = tiny_config(tmp_path, data=str(tmp_path / "data"))
    with pytest.raises(UserError, match=r"data was \w{12} and is \w{12}"):
        train(config, resume=True, quiet=True)

    # What was best on the text before is not compared with what comes after.
    real = Validation.evaluate
    monkeypatch.setattr(Validation, "evaluate", lambda *args: {**real(*args), "cross_entropy": 50.0})
    assert train(config, resume=True, allow_changes=True, quiet=True)["best_cross_entropy"] == 50.0


# Two to the power of 80 entries, which the settings' digest would write out.
DOUBLED = "\n".join(["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 81))])


@pytest.mark.parametrize("content", ["", "[1, 2]", "a: [", "just words", DOUBLED])
def test_resuming_with_a_broken_configuration_is_refused(tiny_config, tmp_path: Path, content: str):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(content)
    with pytest.raises(UserError, match="config.yaml cannot be read"):
        train(tiny_config(tmp_path), resume=True, quiet=True)


# --- other settings, data or critics --------------------------------------------------------------------------------


def stop_after_step_6(config: TrainConfig, interrupt) -> None:
    interrupt(7)
    with pytest.raises(Interrupted):
        train(config, quiet=True)


def test_another_critic_under_the_same_name_is_refused(tiny_config, tmp_path: Path, critic_folder: Path, interrupt):
    shutil.copytree(critic_folder, tmp_path / "critic")
    config = tiny_config(tmp_path, critic=str(tmp_path / "critic"))
    stop_after_step_6(config, interrupt)
    path = tmp_path / "critic" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    before = contents_of(tmp_path / "run")
    with pytest.raises(UserError, match=r"critic .*critic was \w{12} and is \w{12}\. Pass --allow_changes"):
        train(config, resume=True, quiet=True)
    assert contents_of(tmp_path / "run") == before
    assert train(config, resume=True, allow_changes=True, quiet=True)["steps"] == 8


def test_changes_are_allowed_when_asked_for_and_written_down(tiny_config, tmp_path: Path, interrupt):
    stop_after_step_6(tiny_config(tmp_path), interrupt)
    changed = tiny_config(tmp_path, steps=9, optim=OptimConfig(learning_rate=2e-2, warmup_steps=2))
    assert train(changed, resume=True, allow_changes=True, quiet=True)["steps"] == 9
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    (resumption,) = environment["resumed"]
    assert resumption["step"] == 4
    assert resumption["sizes"]["player_flops"] == environment["sizes"]["player_flops"] * 9 // 8  # of another run
    assert resumption["changes"] == ["optim.learning_rate was 0.01 and is 0.02", "steps was 8 and is 9"]
    assert train(changed, resume=True, quiet=True)["steps"] == 9  # they are the run's settings now


def test_changes_may_be_interrupted_before_their_first_checkpoint(tiny_config, tmp_path: Path, interrupt):
    stop_after_step_6(tiny_config(tmp_path), interrupt)
    changed = tiny_config(tmp_path, steps=9)
    interrupt(2)
    with pytest.raises(Interrupted):
        train(changed, resume=True, allow_changes=True, quiet=True)
    assert train(changed, resume=True, quiet=True)["steps"] == 9


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_another_optimiser_starts_anew(tiny_config, tmp_path: Path, interrupt, name: str):
    other = {"adamw": "muon", "muon": "adamw"}[name]
    optim = {key: OptimConfig(name=key, learning_rate=1e-2, warmup_steps=2) for key in (name, other)}
    stop_after_step_6(tiny_config(tmp_path, optim=optim[name]), interrupt)
    train(tiny_config(tmp_path, optim=optim[other]), resume=True, allow_changes=True, quiet=True)
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-00000008" / "optimiser.safetensors")
    matrices = {key.rpartition(".")[2] for key in saved if "proj" in key}
    assert matrices == ({"momentum_buffer"} if other == "muon" else {"step", "exp_avg", "exp_avg_sq"})


def test_another_objective_takes_its_snapshot_from_what_was_reached(tiny_config, tmp_path: Path, interrupt):
    """Steps 5 and 6 of a cycle of three that begins at 4: nobody refreshes before 7."""
    stop_after_step_6(tiny_config(tmp_path), interrupt)
    interrupt(2)
    with pytest.raises(Interrupted):
        train(
            tiny_config(tmp_path, objective="ppo", checkpoint_every_steps=1),
            resume=True,
            allow_changes=True,
            quiet=True,
        )
    folder = tmp_path / "run" / "checkpoints"
    snapshot = load_file(folder / "step-00000005" / "snapshot.safetensors")
    before = load_file(folder / "step-00000004" / "player.safetensors")
    assert_same_weights(snapshot, before)


def test_fewer_steps_than_were_taken_are_refused(tiny_config, tmp_path: Path, interrupt):
    stop_after_step_6(tiny_config(tmp_path), interrupt)
    with pytest.raises(UserError, match="steps is 3, but the run has taken 4 already"):
        train(tiny_config(tmp_path, steps=3), resume=True, allow_changes=True, quiet=True)


def test_another_precision_is_named_as_such(tiny_config, tmp_path: Path, interrupt):
    """Critics are held in it, and are no others."""
    stop_after_step_6(tiny_config(tmp_path), interrupt)
    with pytest.raises(UserError) as refusal:
        train(tiny_config(tmp_path, precision="bf16"), resume=True, quiet=True)
    assert "precision was 'fp32' and is 'bf16'" in str(refusal.value) and "critic" not in str(refusal.value)
    assert train(tiny_config(tmp_path, precision="bf16"), resume=True, allow_changes=True, quiet=True)["steps"] == 8


def test_a_cpu_on_which_muon_multiplies_otherwise_is_named(tiny_config, tmp_path: Path, interrupt, monkeypatch):
    config = tiny_config(tmp_path, optim=OptimConfig(name="muon", learning_rate=1e-2, warmup_steps=2))
    monkeypatch.setattr("avatarl.training.optim.pick_precision", lambda *_: "fp32")
    stop_after_step_6(config, interrupt)
    run = tmp_path / "run"
    environment = json.loads((run / "environment.json").read_text())
    assert environment["identity"]["muon precision"] == "fp32"
    monkeypatch.setattr("avatarl.training.optim.pick_precision", lambda *_: "bf16")
    with pytest.raises(UserError, match=r"run: muon precision was fp32 and is bf16\. Pass --allow_changes"):
        train(config, resume=True, quiet=True)
    assert train(config, resume=True, allow_changes=True, quiet=True)["steps"] == 8
    assert changed_identity({"precision": "fp32"}, {"precision": "fp32", "muon precision": "bf16"}) == []  # earlier


def test_a_setting_that_came_since_has_its_default(tiny_config, tmp_path: Path, interrupt):
    stop_after_step_6(tiny_config(tmp_path), interrupt)
    run = tmp_path / "run"
    settings = yaml.safe_load((run / "config.yaml").read_text())
    del settings["checkpoint_in_background"]
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    environment = json.loads((run / "environment.json").read_text())
    environment["identity"]["settings"] = settings_digest(settings)
    (run / "environment.json").write_text(json.dumps(environment))
    assert check_run_folder(run, tiny_config(tmp_path), resume=True) == []


def test_a_run_whose_record_has_no_identity_is_refused(tiny_config, tmp_path: Path, interrupt):
    stop_after_step_6(tiny_config(tmp_path), interrupt)
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    del environment["identity"]
    (tmp_path / "run" / "environment.json").write_text(json.dumps(environment))
    with pytest.raises(UserError, match="environment.json cannot be read"):
        train(tiny_config(tmp_path), resume=True, quiet=True)


def test_a_configuration_that_was_changed_by_hand_is_refused_as_such(tiny_config, tmp_path: Path, interrupt):
    stop_after_step_6(tiny_config(tmp_path), interrupt)
    path = tmp_path / "run" / "config.yaml"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]))  # as a torn file of an unlucky length would be
    with pytest.raises(UserError, match="config.yaml was changed after the run wrote it"):
        train(tiny_config(tmp_path), resume=True, quiet=True)


def test_what_a_resumed_run_says(tiny_config, tmp_path: Path, interrupt, capfd):
    stop_after_step_6(tiny_config(tmp_path), interrupt)
    capfd.readouterr()
    train(tiny_config(tmp_path, log_every_steps=1), resume=True, allow_changes=True)
    said = capfd.readouterr().err.splitlines()
    assert "allowed: log_every_steps was 2 and is 1" in said and f"{tmp_path / 'run'} resumes after step 4" in said
    train(tiny_config(tmp_path, log_every_steps=1), resume=True)
    assert f"{tmp_path / 'run'} is finished; checking its players" in capfd.readouterr().err


def test_a_best_player_that_was_damaged_is_written_anew(tiny_config, tmp_path: Path, interrupt):
    stop_after_step_6(tiny_config(tmp_path), interrupt)
    path = tmp_path / "run" / "player" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    train(tiny_config(tmp_path), resume=True, quiet=True)
    assert_same_weights(weights_of(tmp_path / "run" / "player"), weights_of(tmp_path / "run" / "final"))


def test_another_shape_of_player_cannot_go_on(tiny_config, tmp_path: Path, interrupt):
    stop_after_step_6(tiny_config(tmp_path), interrupt)
    wider = tiny_config(tmp_path, player=PlayerConfig(settings={**TINY, "intermediate_size": 48}))
    with pytest.raises(UserError, match=r"of another model: model.layers.0.mlp.\w+.weight has shape .* there and"):
        train(wider, resume=True, allow_changes=True, quiet=True)


def test_a_checkpoint_of_another_run_is_not_used(tiny_config, tmp_path: Path, interrupt, capfd):
    train(tiny_config(tmp_path / "whole"), quiet=True)
    stop_after_step_6(tiny_config(tmp_path), interrupt)
    train(tiny_config(tmp_path / "other", seed=2), quiet=True)
    foreign = tmp_path / "run" / "checkpoints" / "step-00000008"
    shutil.copytree(tmp_path / "other" / "run" / "checkpoints" / "step-00000008", foreign)
    capfd.readouterr()
    train(tiny_config(tmp_path), resume=True)
    assert (
        f"{foreign} is damaged (it is of another run); trying the one before it" in capfd.readouterr().err.splitlines()
    )
    assert_same_weights(*(weights_of(folder / "run" / "final") for folder in (tmp_path, tmp_path / "whole")))


def test_a_run_that_lost_its_record_is_not_resumed(tiny_config, tmp_path: Path, interrupt):
    stop_after_step_6(tiny_config(tmp_path), interrupt)
    (tmp_path / "run" / "environment.json").unlink()
    with pytest.raises(UserError, match="environment.json is missing, so"):
        train(tiny_config(tmp_path), resume=True, quiet=True)


# --- what a finished run still checks -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["missing", "truncated", "other"])
def test_a_finished_run_mends_its_last_player(tiny_config, tmp_path: Path, how: str):
    config = tiny_config(tmp_path)
    train(config, quiet=True)
    final = tmp_path / "run" / "final"
    expected = weights_of(final)
    if how == "missing":
        shutil.rmtree(final)
    elif how == "truncated":
        (final / "model.safetensors").write_bytes((final / "model.safetensors").read_bytes()[:-8])
    else:
        content = bytearray((final / "model.safetensors").read_bytes())
        content[-3] ^= 1
        (final / "model.safetensors").write_bytes(content)
    train(config, resume=True, quiet=True)
    assert_same_weights(weights_of(final), expected)


@pytest.mark.parametrize("damaged", ["player/model.safetensors", "player/config.json", "final/config.json"])
def test_a_finished_run_mends_what_is_its_last_player(tiny_config, tmp_path: Path, damaged: str):
    config = tiny_config(tmp_path)
    assert train(config, quiet=True)["best_step"] == 8
    before = {name: content for name, (content, _) in contents_of(tmp_path / "run").items()}
    (tmp_path / "run" / damaged).unlink()
    train(config, resume=True, quiet=True)
    assert {name: content for name, (content, _) in contents_of(tmp_path / "run").items()} == before


def test_a_finished_run_notices_that_its_best_player_is_gone(tiny_config, tmp_path: Path, monkeypatch):
    real, pretended = Validation.evaluate, iter([2.0, 3.0])
    monkeypatch.setattr(Validation, "evaluate", lambda *args: {**real(*args), "cross_entropy": next(pretended)})
    config = tiny_config(tmp_path)
    train(config, quiet=True)
    path = tmp_path / "run" / "player" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(RunFailed, match="player, the best player, of step 4, was changed or removed"):
        train(config, resume=True, quiet=True)
