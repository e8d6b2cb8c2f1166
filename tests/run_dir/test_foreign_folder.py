"""A run folder that somebody else made: its links are not followed, and its checkpoints hold what a run writes."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from avatarl import UserError
from avatarl.durable import open_own, remove_folder, replace_file, replace_folder, tidy
from avatarl.lock import RunLock
from avatarl.run_dir.checkpoint import CHECKPOINTS, MANIFEST, STATE, describe, manifest_text, read_manifest
from avatarl.run_dir.identity import ENVIRONMENT, FINISHED
from avatarl.run_dir.tensors import HELD, SavedTensors
from avatarl.training import TrainConfig, train

from ..training.runs import contents_of

STEP = "step-00000004"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def finished(tiny_config, tmp_path_factory) -> TrainConfig:
    """A run of eight steps that has ended."""
    config = tiny_config(tmp_path_factory.mktemp("finished"))
    train(config, quiet=True)
    return config


@pytest.fixture
def config(finished: TrainConfig, tiny_config, tmp_path: Path) -> TrainConfig:
    """A copy of it that was killed after its first checkpoint."""
    run = Path(shutil.copytree(finished.out, tmp_path / "run"))
    shutil.rmtree(run / CHECKPOINTS / "step-00000008")
    shutil.rmtree(run / "final")
    record = json.loads((run / ENVIRONMENT).read_text())
    del record[FINISHED]
    (run / ENVIRONMENT).write_text(json.dumps(record))
    return tiny_config(tmp_path)


# --- links ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """What no run may touch: files and folders with names such as a run gives and removes."""
    folder = tmp_path / "outside"
    for name in (".thesis.old", ".step-00000002.old", ".step-00000003.partial", "step-00000001", "step-00000009"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_text(name)
    (folder / "file").write_text("precious")
    return folder


IN_A_RUN = (".lock", "config.yaml", "environment.json", "metrics.jsonl", "tracker.json", ".config.yaml.partial")
IN_A_RUN += (".metrics.jsonl.partial", "checkpoints", "tensorboard", "player", "final", "refused", "wandb")
IN_A_RUN += (".player.partial", ".player.old", ".final.partial")
IN_A_RUN += tuple(f"checkpoints/{name}" for name in (STEP, "step-00000008", f".{STEP}.old", ".step-00000008.partial"))


@pytest.mark.parametrize("leads_to", ["file", ".", "nothing"])
@pytest.mark.parametrize("name", IN_A_RUN)
def test_a_link_in_a_run_folder_is_refused_and_leads_nowhere(config, outside: Path, name: str, leads_to: str):
    run = Path(config.out)
    if (run / name).is_dir():
        shutil.rmtree(run / name)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside / leads_to)
    before = contents_of(outside), contents_of(run)
    with pytest.raises(UserError, match="is a link; what is written there must lie there|needs a run folder"):
        train(config, resume=True, quiet=True)
    assert (contents_of(outside), contents_of(run)) == before
    assert (run / name).is_symlink() and not (outside / "nothing").exists()


def test_a_link_alone_is_refused_where_a_run_begins(tiny_config, tmp_path: Path, outside: Path):
    """The lock is what a start that was stopped may have left."""
    for name in (".lock", ".config.yaml.partial"):
        config = tiny_config(tmp_path / name)
        Path(config.out).mkdir(parents=True)
        (Path(config.out) / name).symlink_to(outside / "file")
        with pytest.raises(UserError, match="is a link"):
            train(config, quiet=True)
    assert (outside / "file").read_text() == "precious"


@pytest.mark.parametrize("name", ["metrics.jsonl", "tracker.json", ".lock"])
def test_a_pipe_in_a_run_folder_is_not_waited_for(config, name: str):
    path = Path(config.out) / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(UserError, match="is not a file, as a run writes it"):
        train(config, resume=True, quiet=True)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: replace_file(path, "ours"),
        lambda path: replace_folder(path, lambda folder: None),
        remove_folder,
        lambda path: open_own(path, os.O_WRONLY),
        lambda path: tidy(path.parent),
        lambda path: RunLock(path.parent).__enter__(),
    ],
)
@pytest.mark.parametrize("name", ["{}", ".{}.partial", ".{}.old"])
def test_what_writes_or_deletes_refuses_links(tmp_path: Path, outside: Path, write: Callable, name: str):
    """The rule itself, and so that of reports, comparisons and pages of the inspector."""
    folder = tmp_path / "folder"
    folder.mkdir()
    path, link = folder / ".lock", folder / name.format(".lock")
    for target in ("file", "."):
        link.symlink_to(outside / target)
        before = contents_of(outside)
        try:
            write(path)
        except UserError as error:
            assert "is a link" in str(error)
        except FileNotFoundError:
            assert write is remove_folder  # there is nothing to remove
        assert contents_of(outside) == before and link.is_symlink()
        shutil.rmtree(folder)
        folder.mkdir()


def test_what_has_no_name_of_ours_stays(config):
    run = Path(config.out)
    strangers = [run / ".thesis.old", run / ".notes.partial", run / CHECKPOINTS / ".thesis.old"]
    strangers += [run / CHECKPOINTS / "step-00000001", run / CHECKPOINTS / ".mine.partial"]
    for folder in strangers:
        folder.mkdir()
        (folder / "file").write_text("precious")
    (run / ".player.partial").mkdir()
    (run / CHECKPOINTS / ".step-00000008.partial").mkdir()
    train(config, resume=True, quiet=True)
    assert all((folder / "file").read_text() == "precious" for folder in strangers)
    assert not list(run.rglob(".player.*")) + list(run.rglob(".step-*"))


# --- checkpoints whose sums match -------------------------------------------------------------------------------------


def forge(checkpoint: Path, change: Callable[[dict], None], name: str = "player.safetensors") -> None:
    """Change a file of tensors or the state, and write sums that match."""
    path = checkpoint / name
    if name == STATE:
        state = json.loads(path.read_text())
        change(state)
        path.write_text(json.dumps(state))
    else:
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata(), {key: file.get_tensor(key).clone() for key in file.keys()}
        change(tensors)
        save_file(tensors, path, metadata)
    sign(checkpoint)


def sign(checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    files = {path.name: describe(path) for path in checkpoint.iterdir() if path.name != MANIFEST}
    (checkpoint / MANIFEST).write_text(manifest_text(manifest["step"], files, manifest["identity"]))


def replaced(name: str, new: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], None]:
    return lambda tensors: tensors.update({name: new(tensors[name]).contiguous()})


def set_first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.flatten().index_fill(0, torch.tensor([0]), value).view_as(tensor)


SQUARES, STEPS = f"{EMBEDDING}.exp_avg_sq", f"{EMBEDDING}.step"
FORGED_TENSORS = {
    "a weight is NaN": ("player", replaced(EMBEDDING, set_first(torch.nan)), "not finite"),
    "a weight is infinite": ("player", replaced("model.norm.weight", set_first(torch.inf)), "not finite"),
    "rows are missing": ("player", replaced(EMBEDDING, lambda x: x[:10]), r"its pieces are \[10, 16\] from row 0"),
    "rows are too many": ("player", replaced(EMBEDDING, lambda x: torch.cat([x, x])), "its pieces are"),
    "columns are missing": ("player", replaced(EMBEDDING, lambda x: x[:, :1]), "its pieces are"),
    "one number for all": ("player", replaced("model.norm.weight", lambda x: x[0]), "its pieces are"),
    "another dtype": ("player", replaced(EMBEDDING, torch.Tensor.half), "has dtype torch.float16"),
    "a tensor is missing": (
        "player",
        lambda tensors: tensors.pop("model.norm.weight"),
        "lists other tensors",
    ),
    "a moment is NaN": ("optimiser", replaced(f"{EMBEDDING}.exp_avg", set_first(torch.nan)), "not finite"),
    "a square is negative": ("optimiser", replaced(SQUARES, set_first(-1.0)), "negative"),
    "a count is negative": ("optimiser", replaced(STEPS, set_first(-1.0)), "negative"),
    "a moment is short": ("optimiser", replaced(SQUARES, lambda x: x[:3]), "its pieces are"),
}


@pytest.mark.parametrize("how", FORGED_TENSORS)
def test_tensors_that_are_none_of_a_run_are_refused(config, how: str):
    part, change, message = FORGED_TENSORS[how]
    forge(Path(config.out) / CHECKPOINTS / STEP, change, f"{part}.safetensors")
    refused(config, message)


def refused(config: TrainConfig, message: str) -> None:
    """Resuming ends in one line, and changes nothing."""
    before = contents_of(Path(config.out))
    with pytest.raises(UserError, match=message):
        train(config, resume=True, quiet=True)
    assert contents_of(Path(config.out)) == before


def at(*names: str, value: object) -> Callable[[dict], None]:
    def change(state: dict) -> None:
        for name in names[:-1]:
            state = state[name]
        state[names[-1]] = value

    return change


FORGED_STATES = [
    *(at("step", value=value) for value in (3, 5, -4, "4", 4.5, True, None, float("inf"), 10**30)),
    *(at(name, value=value) for name in ("windows", "tokens", "logged_tokens") for value in (-1, 1.5, 10**30, "1")),
    *(at(name, value=value) for name in ("player_flops", "critic_flops") for value in (-1, 1.5, None)),
    *(at("cache_flops", value=value) for value in (3, {"x": "y"}, {"x": -1})),
    *(at("best_step", value=value) for value in (0, 5, -1, 2.5, "4", True)),
    *(at("best_player", value=value) for value in (3, [], {"a": 1}, {"a": {"bytes": -1, "sha256": "x"}})),
    *(at("best_cross_entropy", value=value) for value in (None, "1", float("nan"), float("inf"))),
    *(at("cross_entropy", value=value) for value in (None, "1", [1])),
    *(at(name, value=v) for name in ("seconds", "unlogged_seconds") for v in (-1.0, None, "1", math.nan, math.inf)),
    *(at("sums", value=value) for value in (None, [], {"loss": "x"}, {"loss": None}, {"loss": [1.0]})),
    *(at("guard", value=value) for value in (None, {}, [])),
    *(
        at("guard", "counts", value=value)
        for value in ([1, 2], [-1, 0, 0], [4, 0, 1], [4, 9, 0], [4, 0, "x"], [4.5, 0, 0])
    ),
    *(at("guard", "losses", value=value) for value in (None, ["x"], [float("nan")], [[1.0]])),
    *(at("guard", "last", value=value) for value in (3, [["1"]], [["inf", "1", "1"]], [["9", "1", "1"]], [["x"] * 3])),
    lambda state: state.pop("windows"),
]


@pytest.mark.parametrize("number", range(len(FORGED_STATES)))
def test_a_state_that_is_none_of_a_run_is_refused(config, number: int):
    forge(Path(config.out) / CHECKPOINTS / STEP, FORGED_STATES[number], STATE)
    refused(config, f"{STEP} is not valid")


def scale(tensors: dict) -> None:
    for tensor in tensors.values():
        tensor.mul_(1.5)


@pytest.mark.parametrize("change", [scale, FORGED_TENSORS["a weight is NaN"][1]])
def test_the_good_players_of_a_finished_run_stay(finished, tiny_config, tmp_path: Path, change):
    """Its record names the checkpoints that it left: a forged one is damage; where all are, nothing is touched."""
    config = tiny_config(tmp_path)
    run = Path(shutil.copytree(finished.out, config.out))
    players = {name: content for name, (content, _) in contents_of(run).items() if name.startswith(("final", "player"))}
    forge(run / CHECKPOINTS / "step-00000008", change)
    train(config, resume=True, quiet=True)
    after = contents_of(run)
    assert all(after[name][0] == content for name, content in players.items() if not name.endswith("README.md"))
    for step in (STEP, "step-00000008"):
        forge(run / CHECKPOINTS / step, change)
    refused(config, "all 2 checkpoints are damaged")


# --- rows of divided tensors ------------------------------------------------------------------------------------------


def pieces(folder: Path, *parts: tuple[int, int], shape: tuple[int, int] = (4, 2)) -> list[Path]:
    """Files that hold rows ``[first, stop)`` each of one tensor of ``shape``."""
    paths = []
    for number, (first, stop) in enumerate(parts):
        paths.append(folder / f"player-{number}.safetensors")
        rows = torch.arange(2.0 * first, 2.0 * stop).view(-1, 2)
        save_file({"weight": rows}, paths[-1], {HELD: json.dumps({"weight": [first, shape]})})
    return paths


@pytest.mark.parametrize(
    "parts", [[(0, 4)], [(0, 2), (2, 4)], [(2, 4), (0, 2)], [(0, 3), (3, 4), (4, 4)], [(0, 4)] * 2]
)
def test_rows_that_cover_a_tensor_once_are_read(tmp_path: Path, parts: list):
    target = torch.full((4, 2), -1.0)
    SavedTensors(pieces(tmp_path, *parts)).read_into(target, "weight")
    assert torch.equal(target, torch.arange(8.0).view(4, 2))


@pytest.mark.parametrize(
    "parts",
    [
        [(0, 3)],
        [(1, 4)],
        [(0, 2)],
        [(0, 2), (3, 4)],
        [(0, 3), (2, 4)],
        [(0, 2), (0, 2), (2, 4)],
        [(0, 4), (0, 2)],
        [(0, 5)],
    ],
)
def test_rows_that_are_missing_or_twice_are_refused(tmp_path: Path, parts: list):
    with pytest.raises(UserError, match=r"weight has shape \(4, 2\), but its pieces are"):
        SavedTensors(pieces(tmp_path, *parts))


def test_files_that_disagree_on_a_shape_are_refused(tmp_path: Path):
    (tmp_path / "other").mkdir()
    files = [*pieces(tmp_path, (0, 2)), *pieces(tmp_path / "other", (2, 4), shape=(6, 2))]
    with pytest.raises(UserError, match="another shape in another file"):
        SavedTensors(files)
