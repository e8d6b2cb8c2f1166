"""Where a command writes: an empty folder stays what it is, and what cannot be written is found before any work."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import yaml

from avatarl.cli import main
from avatarl.data import PreparedData
from avatarl.data.prepare import prepare
from avatarl.errors import RunFailed

from .conftest import BLOCK, TINY, write_documents

TRAIN = {
    "objective": "cross_entropy",
    "player": {"settings": TINY},
    "block_size": BLOCK,
    "micro_batch_size": 4,
    "steps": 2,
    "device": "cpu",
    "precision": "fp32",
    "tensorboard": False,
}


@pytest.fixture
def commands(tmp_path: Path, data_folder: Path, critic_folder: Path) -> dict[str, list[str]]:
    """What makes a folder, without its ``--out``."""
    source = write_documents(tmp_path / "documents.jsonl", count=30, seed=1)
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({**TRAIN, "data": str(data_folder)}))
    arms = {"data": str(data_folder), "base": TRAIN, "arms": {"cross_entropy": {}}, "seeds": [1]}
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(arms))
    cache = [
        "--critic",
        str(critic_folder),
        "--data",
        str(data_folder),
        "--block_size",
        str(BLOCK),
        "--precision",
        "fp32",
    ]
    return {
        "prepare": ["prepare", str(source), "--tokenizer", str(data_folder / "tokenizer")],
        "critic cache": ["critic", "cache", *cache, "--device", "cpu"],
        "train": ["train", "--config", str(tmp_path / "train.yaml")],
        "compare": ["compare", "--config", str(tmp_path / "compare.yaml"), "--device", "cpu"],
        "demo": ["demo", str(source)],
    }


@pytest.mark.parametrize("command", ["prepare", "critic cache", "train"])
@pytest.mark.parametrize("place", ["link", "here", "volume"])
def test_an_empty_folder_is_filled_where_it_is(commands, tmp_path: Path, monkeypatch, command: str, place: str):
    """A link stays one; where somebody works, and where a volume is mounted, no other folder takes its place."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder if place == "here" else tmp_path)
    is_same = folder.stat().st_ino
    if place == "volume":  # whose mount point the system lets nobody rename or remove
        for name in ("rename", "rmdir"):
            real = getattr(os, name)
            monkeypatch.setattr(
                os, name, lambda path, *rest, real=real, **how: real(_not_of(folder, path, *rest), *rest, **how)
            )
    assert main([*commands[command], "--out", {"link": "link", "here": ".", "volume": "folder"}[place]]) == 0
    assert (tmp_path / "link").is_symlink() and folder.stat().st_ino == is_same
    made = {"prepare": "manifest.json", "critic cache": "cache.json", "train": "final"}[command]
    assert (folder / made).exists() and not list(folder.glob(".unfinished*"))
    if command == "prepare":
        assert len(PreparedData.open(folder).train) > 0


def _not_of(folder: Path, *paths: object) -> object:
    assert folder.resolve() not in [Path(os.fspath(path)).resolve() for path in paths]
    return paths[0]


@pytest.mark.parametrize("command", ["prepare", "critic cache", "train", "compare", "demo"])
def test_a_link_to_nothing_is_refused(commands, tmp_path: Path, monkeypatch, capsys, command: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("nowhere")
    before = set(tmp_path.rglob("*"))
    assert main([*commands[command], "--out", "link"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "avatarl: out is link, a link to what does not exist; expected a folder, or a name that is free"
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["prepare", "critic cache", "train", "compare", "demo"])
def test_a_name_that_is_too_long_is_refused(commands, tmp_path: Path, monkeypatch, capsys, command: str):
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    assert main([*commands[command], "--out", "x" * 300]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("avatarl: out is xxx") and "which cannot be made (File name too long)" in line
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["prepare", "critic cache", "train", "compare", "demo"])
def test_a_file_in_the_way_is_refused(commands, tmp_path: Path, monkeypatch, capsys, command: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/below"):
        assert main([*commands[command], "--out", out]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("avatarl: out")
    assert (tmp_path / "file").read_text() == "mine"


def test_what_was_prepared_stays_where_its_place_was_taken_meanwhile(commands, tmp_path: Path, monkeypatch):
    module = sys.modules["avatarl.data.prepare"]
    real = module._prepare_text
    source, tokenizer = commands["prepare"][1], commands["prepare"][3]
    for out in (tmp_path / "new", tmp_path / "empty"):
        if out.name == "empty":
            out.mkdir()

        def meanwhile(*arguments, out=out) -> dict:
            out.mkdir(exist_ok=True)
            (out / "theirs").write_text("theirs")
            return real(*arguments)

        monkeypatch.setattr(module, "_prepare_text", meanwhile)
        with pytest.raises(RunFailed, match="no longer as it was .*; what was made is ") as failure:
            prepare([source], out, tokenizer=tokenizer, quiet=True)
        assert len(PreparedData.open(str(failure.value).rpartition(" is ")[2]).train) > 0
        assert [path.name for path in out.iterdir() if not path.name.startswith(".")] == ["theirs"]


def test_an_empty_folder_is_used_though_an_earlier_process_was_killed_in_it(commands, tmp_path: Path):
    (tmp_path / "out" / ".unfinished-1").mkdir(parents=True)
    assert main([*commands["prepare"], "--out", str(tmp_path / "out")]) == 0
    PreparedData.open(tmp_path / "out")


# --- pages ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["report", "inspect"])
def page(request, commands, tmp_path: Path, critic_folder: Path) -> list[str]:
    """What writes a page, without its ``--out``."""
    if request.param == "inspect":
        return ["inspect", "--player", str(critic_folder), "--critic", str(critic_folder), "--text", "old oak"]
    assert main([*commands["train"], "--out", str(tmp_path / "run")]) == 0
    return ["report", str(tmp_path / "run"), "--evaluate", "false"]


def test_a_page_is_written_where_a_link_leads(page: list[str], tmp_path: Path):
    (tmp_path / "pages").mkdir()
    for target in ("pages/there.html", "pages/new.html"):
        if "there" in target:
            (tmp_path / target).write_text("the one before")
        link = tmp_path / "link.html"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        assert main([*page, "--out", str(link)]) == 0
        assert link.is_symlink() and (tmp_path / target).read_text().startswith("<!doctype html>")


def test_a_page_that_cannot_be_written_is_refused_before_any_work(page: list[str], tmp_path: Path, monkeypatch, capsys):
    def work(*_, **__) -> None:
        raise AssertionError("it has begun")

    monkeypatch.setattr("avatarl.results.players.load_model", work)
    monkeypatch.setattr("avatarl.results.report.read_runs", work)
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "nowhere.html").symlink_to("no/where.html")
    os.mkfifo(tmp_path / "pipe.html")
    (tmp_path / "locked").mkdir(mode=0o555)
    monkeypatch.setattr(os, "access", lambda path, _mode: "locked" not in os.fspath(path))  # root may write anywhere
    for out, message in {
        "folder.html": "which is a folder; expected a file",
        "pipe.html": "which is no file; expected a file",
        "missing/page.html": "whose folder does not exist",
        "nowhere.html": "whose folder does not exist",
        "locked/page.html": "whose folder cannot be written in",
    }.items():
        assert main([*page, "--out", str(tmp_path / out)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"avatarl: out is {tmp_path / out}, {message}")
