"""Checkpoints: whole or absent, damage noticed, and only so many kept."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from avatarl import UserError, durable
from avatarl.durable import replace_file, replace_folder, tidy
from avatarl.errors import RunFailed
from avatarl.run_dir import checkpoint as module
from avatarl.run_dir.checkpoint import CHECKPOINTS, Checkpoints, newest_good_checkpoint, steps_found
from avatarl.run_dir.tensors import Held
from avatarl.training import train
from avatarl.training.processes import Processes

from ..training.runs import Interrupted, assert_same_weights, contents_of, lines_of, weights_of


def save(run: Path, step: int, keep_last: int = 2, keep_every: int | None = None, value: float = 0.0) -> Path:
    tensors = {"player": {"weight": Held.of(torch.full((3, 2), value))}}
    Checkpoints(run, {"data": "d"}, Processes(), keep_last, keep_every).save(step, tensors, {"step": step})
    return run / CHECKPOINTS / f"step-{step:08d}"


def damage(checkpoint: Path) -> None:
    path = checkpoint / "player.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_damaged_newest_checkpoint_is_skipped_with_one_line(tiny_config, tmp_path: Path, interrupt, capfd):
    settings = dict(steps=12, eval_every_steps=12, objective="cross_entropy")
    train(tiny_config(tmp_path / "whole", **settings), quiet=True)
    interrupt(10)
    with pytest.raises(Interrupted):
        train(tiny_config(tmp_path, **settings), quiet=True)
    assert steps_found(tmp_path / "run" / CHECKPOINTS) == [4, 8]
    newest = tmp_path / "run" / CHECKPOINTS / "step-00000008"
    damage(newest)
    capfd.readouterr()
    train(tiny_config(tmp_path, **settings), resume=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert [line for line in err.splitlines() if " is damaged (" in line] == [
        f"{newest} is damaged (player.safetensors does not match its manifest); trying the one before it"
    ]
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole" / "run")
    assert_same_weights(*(weights_of(folder / "run" / "final") for folder in (tmp_path, tmp_path / "whole")))


def test_when_every_checkpoint_is_damaged_the_user_is_told(tiny_config, tmp_path: Path):
    train(tiny_config(tmp_path), quiet=True)
    for step in (4, 8):
        damage(tmp_path / "run" / CHECKPOINTS / f"step-{step:08d}")
    before = contents_of(tmp_path / "run")
    with pytest.raises(UserError, match="all 2 checkpoints are damaged"):
        train(tiny_config(tmp_path), resume=True, quiet=True)
    assert contents_of(tmp_path / "run") == before


def change_digit(path: Path) -> None:
    content = path.read_text()
    place = next(i for i, letter in enumerate(content) if letter.isdigit())
    path.write_text(content[:place] + str((int(content[place]) + 1) % 10) + content[place + 1 :])


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


MANIFEST_DAMAGE = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_text(""),
    "a list": lambda path: path.write_text("[]"),
    "nothing in it": lambda path: path.write_text("{}"),
    "other files": lambda path: path.write_text('{"step": 2, "identity": {}, "files": 3}'),
    "a digit changed": change_digit,
    "a space more": lambda path: path.write_text(path.read_text() + " "),
    "deep": lambda path: path.write_text("[" * 100_000),
    "binary": lambda path: path.write_bytes(b"\xff\xfe"),
    "a pipe": make_pipe,
}


@pytest.mark.parametrize("how", MANIFEST_DAMAGE)
def test_a_broken_manifest_is_damage(tmp_path: Path, how: str):
    save(tmp_path, 1), save(tmp_path, 2)
    MANIFEST_DAMAGE[how](tmp_path / CHECKPOINTS / "step-00000002" / "manifest.json")
    reports: list[str] = []
    assert newest_good_checkpoint(tmp_path, reports.append).name == "step-00000001"
    assert len(reports) == 1


def test_a_checkpoint_under_another_ones_name_is_damage(tmp_path: Path):
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    newer.rename(tmp_path / "away")
    older.rename(newer)
    with pytest.raises(UserError, match="all 1 checkpoints are damaged"):
        newest_good_checkpoint(tmp_path, print)


def test_a_file_under_a_checkpoints_name_is_damage(tmp_path: Path):
    save(tmp_path, 1)
    (tmp_path / CHECKPOINTS / "step-00000002").write_text("no folder")
    assert newest_good_checkpoint(tmp_path, print).name == "step-00000001"
    save(tmp_path, 2)
    assert newest_good_checkpoint(tmp_path, print).name == "step-00000002"


def test_the_manifest_names_every_file_with_size_and_digest(tmp_path: Path):
    folder = save(tmp_path, 3)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 3 and manifest["identity"] == {"data": "d"}
    assert set(manifest["files"]) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert all(record["bytes"] == (folder / name).stat().st_size for name, record in manifest["files"].items())


def test_a_checkpoint_is_kept_though_a_later_damaged_one_lies_there(tmp_path: Path):
    """The run fell back behind it; counted among the newest it would push out the only good one."""
    save(tmp_path, 10)
    damage(save(tmp_path, 20))
    save(tmp_path, 15, keep_last=1)
    assert steps_found(tmp_path / CHECKPOINTS) == [15]


def test_only_the_newest_and_every_so_manieth_checkpoint_are_kept(tmp_path: Path):
    for step in range(1, 10):
        save(tmp_path, step, keep_last=2, keep_every=3)
    assert sorted(path.name for path in (tmp_path / CHECKPOINTS).iterdir()) == [
        f"step-{step:08d}" for step in (3, 6, 8, 9)
    ]


def test_a_write_that_fails_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch):
    save(tmp_path, 1, keep_last=1)

    def fail(*_) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as broken:
        broken.setattr("avatarl.run_dir.checkpoint.save_part", fail)
        with pytest.raises(OSError):
            save(tmp_path, 2, keep_last=1)
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == ["step-00000001"]
    assert newest_good_checkpoint(tmp_path, print).name == "step-00000001"


# --- in the background ----------------------------------------------------------------------------------------------


def saved_sum(run: Path, step: int) -> float:
    return float(load_file(run / CHECKPOINTS / f"step-{step:08d}" / "player.safetensors")["weight"].sum())


def test_background_writing_copies_what_it_writes_and_delays_nobody(tmp_path: Path, monkeypatch):
    may_write, real = threading.Event(), module.save_part

    def slow(path: Path, held: dict) -> None:
        assert may_write.wait(60)
        real(path, held)

    monkeypatch.setattr(module, "save_part", slow)
    weight = torch.zeros(4)
    tensors = {"player": {"weight": Held.of(weight)}}
    with Checkpoints(tmp_path, {}, Processes(), keep_last=9, keep_every=1, in_background=True) as checkpoints:
        assert checkpoints.save(1, tensors, {})
        weight.fill_(1.0)  # training goes on
        assert not checkpoints.save(2, tensors, {})  # the first is still being written
        may_write.set()
        assert checkpoints.save(3, tensors, {}, is_last=True)
        assert steps_found(tmp_path / CHECKPOINTS) == [1, 3]
    assert (saved_sum(tmp_path, 1), saved_sum(tmp_path, 3)) == (0.0, 4.0)


def test_background_writing_raises_its_error_at_the_next_save(tmp_path: Path, monkeypatch):
    tensors = {"player": {"weight": Held.of(torch.zeros(4))}}

    def fail(*_) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(module, "save_part", fail)
    with Checkpoints(tmp_path, {}, Processes(), keep_last=2, in_background=True) as checkpoints:
        assert checkpoints.save(1, tensors, {})
        with pytest.raises(OSError, match="disk full"):
            for _ in range(1000):
                checkpoints.save(2, tensors, {})
                time.sleep(0.01)
        with pytest.raises(OSError, match="disk full"):
            checkpoints.save(3, tensors, {}, is_last=True)


def test_what_is_being_written_is_finished_though_the_run_fails(tmp_path: Path, monkeypatch):
    real = module.save_part

    def slow(path: Path, held: dict) -> None:
        time.sleep(0.3)
        real(path, held)

    monkeypatch.setattr(module, "save_part", slow)
    with pytest.raises(Interrupted):
        with Checkpoints(tmp_path, {}, Processes(), keep_last=2, in_background=True) as checkpoints:
            checkpoints.save(1, {"player": {"weight": Held.of(torch.ones(4))}}, {})
            raise Interrupted
    assert steps_found(tmp_path / CHECKPOINTS) == [1]


def test_a_file_that_cannot_be_read_is_damage(tmp_path: Path, monkeypatch):
    save(tmp_path, 1), save(tmp_path, 2)
    real = module.describe

    def describe(path: Path) -> dict:
        if path.parent.name == "step-00000002":
            raise OSError(5, "Input/output error")
        return real(path)

    monkeypatch.setattr(module, "describe", describe)
    reports: list[str] = []
    assert newest_good_checkpoint(tmp_path, reports.append).name == "step-00000001"
    assert "player.safetensors cannot be read: Input/output error" in reports[0]


def test_a_run_that_writes_in_the_background_is_the_same_run(tiny_config, tmp_path: Path, interrupt):
    train(tiny_config(tmp_path / "plain", checkpoint_every_steps=2), quiet=True)
    config = tiny_config(tmp_path, checkpoint_every_steps=2, checkpoint_in_background=True)
    interrupt(7)
    with pytest.raises(Interrupted):
        train(config, quiet=True)
    train(config, resume=True, quiet=True)
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "plain" / "run")
    assert_same_weights(*(weights_of(folder / "run" / "final") for folder in (tmp_path, tmp_path / "plain")))


# --- stopped between two renames ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stopped_at", ["filling", "moved away", "in place"])
def test_a_replacement_that_was_stopped_leaves_the_old_or_the_new(tmp_path: Path, monkeypatch, stopped_at: str):
    def write(text: str):
        return lambda folder: (folder / "file").write_text(text)

    replace_folder(tmp_path / "folder", write("old"))

    class Killed(BaseException):
        pass

    renames, real = 0, Path.rename

    def rename(self: Path, target: Path) -> Path:
        nonlocal renames
        renames += 1
        if (stopped_at, renames) in (("filling", 1), ("moved away", 2)):
            raise Killed
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    # Nor does anything tidy after a kill.
    monkeypatch.setattr("avatarl.durable.remove", lambda path: None)
    try:
        replace_folder(tmp_path / "folder", write("new"))
    except Killed:
        pass
    monkeypatch.undo()
    tidy(tmp_path)
    assert (tmp_path / "folder" / "file").read_text() == ("new" if stopped_at == "in place" else "old")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_leaves_the_old_file_and_no_partial_one(tmp_path: Path, monkeypatch, call: str):
    def fail(*_, **__) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write_nothing(path: Path, _: int) -> int:
        path.touch()
        return os.open("/dev/full", os.O_WRONLY)

    replace_file(tmp_path / "page.html", "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail) if call == "fsync" else patch.setattr(durable, "open_own", write_nothing)
        with pytest.raises(OSError, match="No space left"):
            replace_file(tmp_path / "page.html", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("page.html", "old")]


def test_background_writing_ends_when_another_process_cannot_write(tmp_path: Path, monkeypatch):
    """This process's own writer is fine, or blocked in an exchange with the one that failed."""

    class TheOtherFailed(Processes):
        def largest(self, number: int) -> int:
            return max(number, module.FAILED)

    checkpoints = Checkpoints(tmp_path, {}, TheOtherFailed(), keep_last=2, in_background=True)
    for is_last in (False, True):
        with pytest.raises(RunFailed, match="another process could not write its part"):
            checkpoints.save(1, {"player": {"weight": Held.of(torch.ones(4))}}, {}, is_last=is_last)
