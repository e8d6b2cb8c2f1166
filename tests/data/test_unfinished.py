"""What a preparation leaves when it is stopped or killed: nothing, or nothing that is in the way of the next."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from avatarl.data import prepare
from avatarl.data.tokenizer import token_byte_lengths
from avatarl.errors import RunStopped, UserError
from avatarl.lock import RunLock


def prepare_stories(source: Path, out: Path) -> dict:
    return prepare([str(source)], out, tokenizer="bpe:300", quiet=True)


@pytest.mark.parametrize(
    "name", [".out.unfinished-preparation", pytest.param(f".out.unfinished-{os.getpid()}", id="of our number")]
)
def test_what_a_dead_process_left_goes_whatever_its_number_was(stories_file: Path, tmp_path: Path, name: str):
    left = tmp_path / name
    data = left / "data" if "preparation" in name else left
    data.mkdir(parents=True)
    (data / "train-00000.bin").write_bytes(b"half")
    (left / ".lock").write_text("process 1 on elsewhere\n")
    other = tmp_path / ".other.unfinished-preparation"
    other.mkdir()
    prepare_stories(stories_file, tmp_path / "out")
    assert set(tmp_path.iterdir()) == {stories_file, tmp_path / "out", other}


def test_what_a_living_process_makes_stays_and_the_second_one_is_refused(stories_file: Path, tmp_path: Path):
    """A lock is another one for each time that its file is opened, in one process too."""
    place = tmp_path / ".out.unfinished-preparation"
    (place / "data").mkdir(parents=True)
    (kept := place / "data" / "train-00000.bin").touch()
    with RunLock(place):
        with pytest.raises(UserError, match=rf"unfinished-preparation is being written by process {os.getpid()} on "):
            prepare_stories(stories_file, tmp_path / "out")
        assert kept.exists() and not (tmp_path / "out").exists()


def test_what_a_dead_process_had_moved_into_an_empty_folder_goes_too(stories_file: Path, tmp_path: Path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    prepare_stories(stories_file, whole)
    out.mkdir()
    shutil.copytree(whole, out / ".unfinished-preparation" / "data")
    for name in ("tokenizer", "train-00000.bin"):
        (out / ".unfinished-preparation" / "data" / name).rename(out / name)
    mine = out / "mine"
    mine.touch()
    with pytest.raises(UserError, match="exists and is not empty"):
        prepare_stories(stories_file, out)
    assert list(out.iterdir()) == [mine]
    mine.unlink()
    prepare_stories(stories_file, out)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())


@pytest.mark.parametrize("name", [".unfinished-x", ".unfinished-preparation", ".unfinished-7"])
def test_a_manifest_that_somebody_planted_removes_nothing(stories_file: Path, tmp_path: Path, name: str):
    """Neither elsewhere nor in ``out``: not under another name, nor under one of ours where the content is another."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    prepare_stories(stories_file, whole)
    (planted := out / name / "data").mkdir(parents=True)
    kept = [out / each for each in ("mine.txt", "train-00000.bin", "tokenizer/notes.txt")]
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.write_text("precious")
    manifest = json.loads((whole / "manifest.json").read_text())
    manifest["files"] |= {
        "mine.txt": {"bytes": 8, "sha256": sha256(b"precious").hexdigest()},
        "tokenizer/notes.txt": {},
    }
    manifest["files"] |= {f"../{stories_file.name}": {"bytes": 1, "sha256": "0"}, str(stories_file): {}}
    (planted / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / ".out.unfinished-link").symlink_to(whole)
    with pytest.raises(UserError, match="exists and is not empty"):
        prepare_stories(stories_file, out)
    assert stories_file.exists() and (whole / "manifest.json").exists()
    assert [path.read_text() for path in kept] == ["precious"] * 3


@pytest.mark.parametrize("place", ["beside", "within"])
@pytest.mark.parametrize("name", [".unfinished-notes", ".unfinished-preparation", ".unfinished-7"])
def test_a_hidden_folder_of_somebody_else_stays(stories_file: Path, tmp_path: Path, name: str, place: str):
    out = tmp_path / "out"
    theirs = (out / name if place == "within" else tmp_path / f".out{name}") / "thesis.txt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("precious")
    with contextlib.suppress(UserError):  # where it is in the way, that is said
        prepare_stories(stories_file, out)
    assert theirs.read_text() == "precious"


@pytest.mark.parametrize("linked", ["", "data", "data/train-00000.bin"])
def test_a_link_in_the_way_stays(stories_file: Path, tmp_path: Path, linked: str):
    (theirs := tmp_path / "theirs").mkdir()
    (theirs / "train-00000.bin").write_text("precious")
    link = tmp_path / ".out.unfinished-preparation" / linked
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(theirs / link.name if link.suffix else theirs)
    with pytest.raises(UserError, match="is in the way: a link, or what `prepare` did not write; move it away"):
        prepare_stories(stories_file, tmp_path / "out")
    assert link.is_symlink() and (theirs / "train-00000.bin").read_text() == "precious"


def test_the_manifest_is_moved_last(stories_file: Path, tmp_path: Path, monkeypatch):
    moved, rename = [], Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, to: moved.append(path.name) or rename(path, to))
    (tmp_path / "out").mkdir()
    prepare_stories(stories_file, tmp_path / "out")
    assert moved[-1] == "manifest.json" and len(moved) == 4, moved


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing(stories_file: Path, tmp_path: Path, monkeypatch, number: signal.Signals):
    before = signal.signal(number, signal.SIG_DFL)
    module = sys.modules[prepare.__module__]
    monkeypatch.setattr(module, "token_byte_lengths", lambda _: [os.kill(os.getpid(), number) for _ in range(2)])
    try:
        with pytest.raises(RunStopped, match="nothing is left of it; the same command starts again") as stop:
            prepare_stories(stories_file, tmp_path / "made" / "out")
        assert signal.getsignal(number) is signal.SIG_DFL and signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(number, before)
    assert stop.value.signum == number
    assert list(tmp_path.iterdir()) == [stories_file]


def test_what_a_program_does_at_a_signal_stays(stories_file: Path, tmp_path: Path, monkeypatch):
    def hang_up(tokenizer):
        os.kill(os.getpid(), signal.SIGHUP)
        return token_byte_lengths(tokenizer)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr(sys.modules[prepare.__module__], "token_byte_lengths", hang_up)
        prepare_stories(stories_file, tmp_path / "out")
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (tmp_path / "out" / "manifest.json").is_file()


BUSY = """
import ctypes, os, signal, sys, threading
from pathlib import Path
from avatarl.data.unfinished import all_or_nothing
with all_or_nothing(Path(sys.argv[1])) as folder:
    (folder / "file").touch()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # as if it waited for threads that are not Python's
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    ctypes.CDLL(None).sleep(300)
"""


def test_a_signal_ends_a_process_that_waits_outside_of_python(tmp_path: Path):
    out = tmp_path / "made" / "out"
    ended = subprocess.run([sys.executable, "-c", BUSY, str(out)], stderr=subprocess.PIPE, text=True, timeout=200)
    assert ended.returncode == 143
    assert ended.stderr == "avatarl: stopped, and nothing is left of it; the same command starts again\n"
    assert list(tmp_path.iterdir()) == []
