"""A run, a cache or a comparison is its folder, wherever that and the working directory are."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from avatarl import UserError
from avatarl.cli import main
from avatarl.data import PreparedData
from avatarl.data.prepare import prepare
from avatarl.models.critic_cache import CriticCache
from avatarl.places import kept, located
from avatarl.results.inspect import settings_and_critics
from avatarl.results.report import report
from avatarl.run_dir.checkpoint import manifest_text
from avatarl.run_dir.identity import settings_digest
from avatarl.training.optim import Optimisers

from .conftest import BLOCK, TINY, write_documents
from .training.runs import assert_same_weights, weights_of

RECIPE = {
    "objective": "avatarl",
    "critic": "critics/small",
    "avatarl": {"top_k": 4, "threshold": "none"},
    "player": {"settings": TINY},
    "optim": {"learning_rate": 0.01, "warmup_steps": 2},
    "block_size": BLOCK,
    "micro_batch_size": 4,
    "steps": 8,
    "precision": "fp32",
    "device": "cpu",
    "eval_every_steps": 4,
    "eval_windows": 4,
    "checkpoint_every_steps": 4,
    "tensorboard": False,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_folder: Path, critic_folder: Path) -> Path:
    """A tree with data, a critic, and ``runs/whole``, made by a command in it with relative paths."""
    tree = tmp_path_factory.mktemp("tree")
    shutil.copytree(data_folder, tree / "data")
    shutil.copytree(critic_folder, tree / "critics" / "small")
    (tree / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "data": "data", "out": "runs/whole"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tree)
        assert main(["train", "--config", "recipe.yaml"]) == 0
    return tree


@pytest.fixture
def tree(finished: Path, tmp_path: Path, monkeypatch, capsys) -> Path:
    """A copy of it, with ``runs/part``, which was stopped after six of its eight steps, four of them saved."""
    tree = Path(shutil.copytree(finished, tmp_path / "tree"))
    real, steps = Optimisers.step, iter(range(6))

    def step(*arguments) -> float:
        next(steps)  # StopIteration
        return real(*arguments)

    monkeypatch.chdir(tree)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimisers, "step", step)
        assert main(["train", "--config", "recipe.yaml", "--out", "runs/part"]) == 1
    capsys.readouterr()
    return tree


def move_run(tree: Path) -> Path:
    (tree / "runs" / "part").rename(tree / "renamed")
    return tree / "renamed"


def move_run_away(tree: Path) -> Path:
    away = tree.parent / "deep" / "er" / "than before"
    away.parent.mkdir(parents=True)
    (tree / "runs" / "part").rename(away)
    return away


def move_tree(tree: Path) -> Path:
    return tree.rename(tree.parent / "elsewhere") / "runs" / "part"


def copy_tree(tree: Path) -> Path:
    """And go on with the copy, though what it is of has changed since."""
    copy = Path(shutil.copytree(tree, tree.parent / "copy"))
    (tree / "data" / "manifest.json").write_text("{}")
    return copy / "runs" / "part"


def link_run(tree: Path) -> Path:
    (tree.parent / "link").symlink_to(tree / "runs" / "part")
    return tree.parent / "link"


def keep_relative_paths(tree: Path) -> Path:
    """As earlier versions did, and move it."""
    run = tree / "runs" / "part"
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings |= {"data": "data", "critic": "critics/small", "out": "runs/part"}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    record = json.loads((run / "environment.json").read_text())
    record["identity"]["settings"] = settings_digest(settings)
    (run / "environment.json").write_text(json.dumps(record))
    for path in run.glob("checkpoints/*/manifest.json"):
        manifest = json.loads(path.read_text())
        path.write_text(manifest_text(manifest["step"], manifest["files"], record["identity"]))
    return move_tree(tree)


MOVES = [move_run, move_run_away, move_tree, copy_tree, link_run, keep_relative_paths]


@pytest.mark.parametrize(
    "move, here", [(None, "above"), (None, "inside"), (None, "elsewhere"), *((move, "elsewhere") for move in MOVES)]
)
def test_a_run_goes_on_wherever_it_lies(tree: Path, tmp_path: Path, monkeypatch, capsys, move, here: str):
    run, expected = tree / "runs" / "part", weights_of(tree / "runs" / "whole" / "final")
    run = move(tree) if move else run
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir({"above": run.parent, "inside": run, "elsewhere": tmp_path / "empty"}[here])
    runs = set(tmp_path.rglob("config.yaml"))
    assert main(["train", "--config", os.path.relpath(run / "config.yaml"), "--resume"]) == 0
    assert "resumes after step 4" in capsys.readouterr().err
    assert_same_weights(weights_of(run / "final"), expected)
    assert set(tmp_path.rglob("config.yaml")) == runs and not any((tmp_path / "empty").iterdir())
    assert main(["train", "--config", os.path.relpath(run / "config.yaml"), "--resume"]) == 0
    assert "is finished" in capsys.readouterr().err


@pytest.mark.parametrize("move", [move_run_away, move_tree])
def test_a_run_s_configuration_is_a_recipe_for_another_folder(tree: Path, tmp_path: Path, monkeypatch, capsys, move):
    """Its paths are where they are from where it lies; those of the command line are where the command runs."""
    expected, run = weights_of(tree / "runs" / "whole" / "final"), move(tree)
    monkeypatch.chdir(tmp_path)
    config = ["train", "--config", str(run / "config.yaml")]
    assert main(config) == 2
    assert f"out is {run}, which already holds files" in capsys.readouterr().err
    for options in ([], ["--resume"]):
        assert main([*config, "--out", "new", *options]) == 0
        assert_same_weights(weights_of(tmp_path / "new" / "final"), expected)


def test_a_copy_of_a_configuration_beside_no_run_is_a_recipe(tree: Path, tmp_path: Path, monkeypatch):
    """``--resume`` begins at step 0 where no checkpoint was completed."""
    run = tree / "runs" / "part"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    shutil.copy(run / "config.yaml", tmp_path / "recipe.yaml")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", "recipe.yaml", "--out", "new", "--resume"]) == 0
    assert_same_weights(weights_of(tmp_path / "new" / "final"), weights_of(tree / "runs" / "whole" / "final"))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize("name", ["data", "critic"])
def test_what_lies_elsewhere_may_be_given_anew(tree: Path, data_folder: Path, tmp_path: Path, capsys, name: str):
    """Whether it is the same, its digest says: nothing has to be allowed."""
    (tree / {"data": "data", "critic": "critics"}[name]).rename(tmp_path / "moved")
    moved = str(tmp_path / {"data": "moved", "critic": "moved/small"}[name])
    resume = ["train", "--config", "runs/part/config.yaml", "--resume"]
    if name == "data":
        source = write_documents(tmp_path / "documents.jsonl", count=60, seed=2)
        prepare([str(source)], tmp_path / "other", tokenizer=str(data_folder / "tokenizer"), quiet=True)
        assert main([*resume, "--data", str(tmp_path / "other")]) == 2
        assert "data was " in capsys.readouterr().err
    assert main([*resume, f"--{name}", moved]) == 0
    record = json.loads((tree / "runs" / "part" / "environment.json").read_text())
    assert [start["changes"] for start in record["resumed"]] == [[]]
    assert main(["train", "--config", "runs/part/config.yaml", "--resume"]) == 0  # it is known now


def lose(tree: Path) -> Path:
    """Move a run where nothing of its tree is any more."""
    run = move_run_away(tree)
    for name in ("data", "critics"):
        shutil.rmtree(tree / name)
    return run


def test_what_is_not_there_is_named_with_whose_it_is_and_where_it_was_looked_for(tree: Path, tmp_path: Path, capsys):
    run, near = lose(tree), tmp_path / "deep"
    config = run / "config.yaml"
    data = f"it is data of {config}, looked for at {near / 'data'} and at {tree / 'data'}"
    critic = f"it is critic of {config}, looked for at {near / 'critics/small'} and at {tree / 'critics/small'}"
    for options in (["--resume"], ["--out", str(tmp_path / "new")]):
        assert main(["train", "--config", str(config), *options]) == 2
        assert data in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert main(["inspect", "--player", str(run), "--text", "old oak", "--device", "cpu"]) == 2
    assert critic in capsys.readouterr().err
    with pytest.raises(UserError, match="it is critic of .* looked for at"):
        settings_and_critics(run)  # of the page that `avatarl play` serves
    report([run], tmp_path / "report.md", quiet=True)
    assert f"not evaluated: {tree / 'data'}/manifest.json: no such file; {data}" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("command", ["inspect", "report", "plan"])
def test_readers_find_what_a_run_names(tree: Path, tmp_path: Path, monkeypatch, capsys, command: str):
    run = move_tree(tree)
    monkeypatch.chdir(tmp_path)
    options = {
        "inspect": ["--player", str(run), "--text", "old oak", "--device", "cpu"],
        "report": [str(run), "--out", "report.md", "--max_windows", "2", "--sample_tokens", "2", "--device", "cpu"],
        "plan": ["--config", str(run / "config.yaml")],
    }
    assert main([command, *options[command]]) == 0
    said = capsys.readouterr()
    assert "does not exist" not in said.out and "is not here" not in said.out
    if command == "report":
        assert "not evaluated" not in (tmp_path / "report.md").read_text()


def test_ids_of_the_hub_stay_as_they_are(tmp_path: Path):
    settings = {"out": "runs/a", "data": str(tmp_path), "critic": ["gpt2", "OWNER/NAME", "ema:0.9:5"]}
    assert kept(settings)["critic"] == settings["critic"] == located(settings, "runs/a")["critic"]
    assert kept({"out": "o", "critics": {"a": {}}, "arms": {"x": {"critic": "tests"}}}, ["tests"])["arms"]["x"] == {
        "critic": "tests"
    }


# --- caches -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cached(tree: Path) -> Callable[..., int]:
    def cache(*options: str, critic: str = "critics/small", data: str = "data", out: str = "caches/small") -> int:
        words = ["--critic", critic, "--data", data, "--out", out, "--block_size", str(BLOCK), "--precision", "fp32"]
        return main(["critic", "cache", *words, "--device", "cpu", *options])

    assert cache() == 0
    return cache


def test_the_same_command_is_the_same_cache_from_elsewhere(tree: Path, cached, monkeypatch):
    monkeypatch.chdir(tree / "runs")
    before = (tree / "caches" / "small" / "cache.json").read_bytes()
    assert cached(critic="../critics/small", data="../data", out="../caches/small") == 0
    assert (tree / "caches" / "small" / "cache.json").read_bytes() == before


def test_the_same_command_is_the_same_cache_where_the_tree_was_moved_to(tree: Path, cached, monkeypatch):
    monkeypatch.chdir(move_tree(tree).parents[1])
    before = Path("caches", "small", "cache.json").read_bytes()
    assert cached() == 0
    assert Path("caches", "small", "cache.json").read_bytes() == before


def test_a_cache_that_was_moved_alone_knows_its_critic(tree: Path, cached, tmp_path: Path, monkeypatch):
    (tree / "caches" / "small").rename(tmp_path / "alone")
    monkeypatch.chdir(tmp_path)
    data = PreparedData.open(tree / "data")
    CriticCache.open("alone", data, BLOCK)
    shutil.copytree(tree / "runs" / "whole" / "final", tree / "critics" / "small", dirs_exist_ok=True)
    with pytest.raises(UserError, match=f"{tree}/critics/small has changed since the cache was made of it"):
        CriticCache.open("alone", data, BLOCK)


@pytest.mark.parametrize("move", [None, move_tree, copy_tree])
def test_a_cache_knows_its_critic_wherever_both_are(tree: Path, cached, tmp_path: Path, monkeypatch, move):
    """That which another directory has under the critic's name is none of it."""
    tree = move(tree).parents[1] if move else tree
    (tmp_path / "other" / "critics").mkdir(parents=True)
    shutil.copytree(tree / "runs" / "whole" / "final", tmp_path / "other" / "critics" / "small")
    monkeypatch.chdir(tmp_path / "other")
    data = PreparedData.open(tree / "data")
    CriticCache.open(tree / "caches" / "small", data, BLOCK)
    shutil.copytree(tmp_path / "other" / "critics" / "small", tree / "critics" / "small", dirs_exist_ok=True)
    with pytest.raises(UserError, match="critics/small has changed since the cache was made of it"):
        CriticCache.open(tree / "caches" / "small", data, BLOCK)
