"""A run's players by name, and a checkpoint's as a model folder that says what the run's own player says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from avatarl import UserError
from avatarl.models import load_model, load_tokenizer
from avatarl.results import generate
from avatarl.results.checkpoints import model_of, players_of
from avatarl.run_dir.checkpoint import CHECKPOINTS, describe, manifest_text, read_manifest
from avatarl.run_dir.tensors import Held, save_part
from avatarl.training import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_config) -> Path:
    """A run of eight steps, with checkpoints after the fourth and the last."""
    folder = tmp_path_factory.mktemp("trained")
    train(tiny_config(folder), quiet=True)
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return shutil.copytree(trained, tmp_path / "run")


def logits_of(model: str | Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(model)(torch.arange(12)[None]).logits


def divide(checkpoint: Path) -> None:
    """Make it one that two processes saved, each the rows it holds."""
    whole = checkpoint / "player.safetensors"
    with safe_open(whole, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    whole.unlink()
    manifest = read_manifest(checkpoint)
    del manifest["files"][whole.name]
    for rank in range(2):
        held = {}
        for name, tensor in tensors.items():
            size = -(-len(tensor) // 2)
            rows = tensor[size * rank : size * (rank + 1)]
            held[name] = Held(rows, min(size * rank, len(tensor)), tuple(tensor.shape))
        path = checkpoint / f"player-{rank + 1:05d}-of-00002.safetensors"
        save_part(path, held)
        manifest["files"][path.name] = describe(path)
    text = manifest_text(manifest["step"], manifest["files"], manifest["identity"])
    (checkpoint / "manifest.json").write_text(text)


def test_every_player_has_a_name(run: Path):
    steps = {f"step {step}": run / CHECKPOINTS / f"step-0000000{step}" for step in (4, 8)}
    assert players_of(run) == {"best": run / "player", "final": run / "final", **steps}
    assert list(players_of(run)) == ["best", "final", "step 4", "step 8"]
    (steps["step 4"] / "manifest.json").unlink()
    shutil.rmtree(run / "final")
    assert list(players_of(run)) == ["best", "step 8"]


@pytest.mark.parametrize("name", ["owner/name", "gpt2"])
def test_a_model_that_is_no_run_is_its_own_player(name: str, critic_folder: Path, tmp_path: Path):
    assert players_of(name) == {"model": name}
    assert model_of(critic_folder, "model", tmp_path) == critic_folder


def test_a_run_before_its_first_player_is_refused(run: Path):
    for folder in ("player", "final", CHECKPOINTS):
        shutil.rmtree(run / folder)
    with pytest.raises(UserError, match="has no player yet; expected a run that was evaluated or has saved"):
        players_of(run)


def test_the_last_checkpoint_is_the_last_player(trained: Path, tmp_path: Path):
    last = model_of(trained, "step 8", tmp_path)
    assert torch.equal(logits_of(last), logits_of(model_of(trained, "final", tmp_path)))
    assert not torch.equal(logits_of(model_of(trained, "step 4", tmp_path)), logits_of(last))
    assert load_tokenizer(last).get_vocab() == load_tokenizer(trained).get_vocab()
    settings = dict(max_new_tokens=5, seed=3, device="cpu")
    assert generate(last, "quick fox", **settings) == generate(trained / "final", "quick fox", **settings)


def test_a_checkpoint_in_the_middle_has_the_weights_of_its_step(trained: Path, tmp_path: Path):
    weights = load_model(model_of(trained, "step 4", tmp_path)).state_dict()
    with safe_open(trained / CHECKPOINTS / "step-00000004" / "player.safetensors", "pt") as file:
        assert len(file.keys()) > 5
        assert all(torch.equal(weights[name], file.get_tensor(name)) for name in file.keys())


def test_parts_of_two_processes_are_one_player(run: Path, tmp_path: Path):
    divide(run / CHECKPOINTS / "step-00000008")
    assert torch.equal(logits_of(model_of(run, "step 8", tmp_path)), logits_of(run / "final"))


def test_the_tokenizer_comes_from_the_data_where_there_is_no_player_yet(run: Path, tokenizer, tmp_path: Path):
    expected = logits_of(run / "final")
    for folder in ("player", "final"):
        shutil.rmtree(run / folder)
    model = model_of(run, "step 8", tmp_path)
    assert load_tokenizer(model).get_vocab() == tokenizer.get_vocab()
    assert torch.equal(logits_of(model), expected)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**settings, "data": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match="its data cannot be read for the tokenizer|gone"):
        model_of(run, "step 4", tmp_path)


def test_nothing_of_the_run_is_touched(run: Path, tmp_path: Path):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    (tmp_path / "out").mkdir()
    model_of(run, "step 4", tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["step-00000004"]


def test_an_unknown_player_is_refused_with_the_names(trained: Path, tmp_path: Path):
    with pytest.raises(UserError, match="no player 'step 5'; expected one of best, final, step 4, step 8; did you"):
        model_of(trained, "step 5", tmp_path)


def flip_a_weight(run: Path) -> str:
    path = run / CHECKPOINTS / "step-00000008" / "player.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return "is damaged .player.safetensors does not match its manifest.; expected a checkpoint"


def take_the_weights(run: Path) -> str:
    (run / CHECKPOINTS / "step-00000008" / "player.safetensors").unlink()
    return "is damaged .player.safetensors is missing."


def change_the_player(run: Path) -> str:
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["player"]["settings"]["hidden_size"] = 32
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    return "the checkpoint is of another model: .* has shape"


def forget_the_player(run: Path) -> str:
    (run / "config.yaml").write_text("steps: 3\n")
    return "config.yaml is not what a run writes .'player'."


def forge_a_checkpoint(run: Path) -> str:
    """One whose manifest is right, of tensors that are not."""
    checkpoint = run / CHECKPOINTS / "step-00000008"
    (checkpoint / "player.safetensors").write_bytes(b"nothing")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["player.safetensors"] = describe(checkpoint / "player.safetensors")
    text = manifest_text(manifest["step"], manifest["files"], manifest["identity"])
    (checkpoint / "manifest.json").write_text(text)
    return "holds no player of this run"


@pytest.mark.parametrize(
    "damage", [flip_a_weight, take_the_weights, change_the_player, forget_the_player, forge_a_checkpoint]
)
def test_damage_is_said_in_a_line_and_leaves_nothing(run: Path, tmp_path: Path, damage):
    message = damage(run)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=message) as refused:
        model_of(run, "step 8", tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert list((tmp_path / "out").iterdir()) == []
