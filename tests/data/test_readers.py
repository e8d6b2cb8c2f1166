"""Several processes read what one reads, in the same order, and leave nothing behind, however they end."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from avatarl.data import prepare
from avatarl.data.corpus import document_pieces
from avatarl.data.readers import read_parts
from avatarl.errors import RunFailed, UserError

from .conftest import story
from .parts import count_to, fail, take_seconds


def write_shards(folder: Path, kind: str, shards: int = 5, stories: int = 8) -> Path:
    """A folder of shards of unequal length: Parquet files of several row groups, or JSON lines, one without any."""
    folder.mkdir()
    for shard in range(shards):
        texts = [story(number) for number in range(shard * stories, (shard + 1) * stories - shard)]
        path = folder / f"train-{shard:05d}-of-{shards:05d}.{kind}"
        if kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=3)
        else:
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts if shard != 3))
    return folder


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    "kind, prefix", [("parquet", "hub:"), pytest.param("jsonl", "hub:", marks=pytest.mark.slow), ("jsonl", "")]
)
def test_the_prepared_folder_is_the_same_for_any_number_of_processes(tmp_path: Path, monkeypatch, kind, prefix):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    source = f"{prefix}{write_shards(tmp_path / 'set', kind)}"
    made = []
    for processes in (1, 2, 3):
        out = tmp_path / str(processes)
        prepare([source], out, tokenizer="bpe:300", shard_tokens=500, processes=processes, quiet=True)
        made.append({path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()})
    assert len(made[0]) > 5
    assert made[0] == made[1] == made[2]


def test_pieces_arrive_as_they_are_and_little_is_read_ahead(tmp_path: Path):
    parts = [partial(count_to, number) for number in (3, 0, 500, 1, 2, 7, 1)]
    expected = [piece for part in parts for piece in part()]
    found, most_files = [], 0
    for pieces in read_parts(parts, processes=2, folder=tmp_path):
        for piece in pieces:
            found.append(piece)
            most_files = max(most_files, sum(path.is_file() for path in tmp_path.rglob("*")))
    assert found == expected
    assert 1 <= most_files <= 3
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error, raised, message",
    [(UserError("bad.txt: no"), UserError, "bad.txt: no"), (KeyError("x"), RunFailed, "KeyError: 'x'")],
)
def test_what_a_process_raises_arrives_here(tmp_path: Path, error, raised, message: str):
    parts = [partial(count_to, 2), partial(fail, error), partial(count_to, 2)]
    read = []
    with pytest.raises(raised, match=message):
        for pieces in read_parts(parts, processes=3, folder=tmp_path):
            read += pieces
    assert len(read) == 2
    assert not list(tmp_path.iterdir())


def test_a_process_that_is_killed_ends_the_reading_in_one_line(tmp_path: Path):
    read = read_parts([partial(count_to, 2)] * 8, processes=2, folder=tmp_path)
    next(read)
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(
        RunFailed, match="a process that reads sources was killed, perhaps for want of memory"
    ) as caught:
        for _ in read:
            pass
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_reading_that_is_given_up_leaves_nothing(tmp_path: Path):
    source = write_shards(tmp_path / "set", "jsonl")
    pieces = document_pieces([str(source)], processes=2, folder=tmp_path)
    next(pieces)
    assert len(multiprocessing.active_children()) == 2
    pieces.close()
    assert not multiprocessing.active_children()
    assert list(tmp_path.iterdir()) == [source]


def test_processes_end_in_the_middle_of_a_part(tmp_path: Path):
    read = read_parts([partial(count_to, 2), partial(take_seconds, tmp_path / "end")], processes=2, folder=tmp_path)
    next(read)
    read.close()
    assert not list(tmp_path.iterdir())


def test_a_mistake_in_a_shard_ends_the_preparation_as_with_one_process(tmp_path: Path):
    source = write_shards(tmp_path / "set", "jsonl")
    (source / "train-00004-of-00005.jsonl").write_text('{"txt": "one"}\n')
    for processes in (1, 2):
        with pytest.raises(UserError, match="train-00004-of-00005.jsonl:1: no field 'text'; found 'txt'"):
            prepare([str(source)], tmp_path / "out", tokenizer="bpe:300", processes=processes, quiet=True)
    assert list(tmp_path.iterdir()) == [source]


def test_no_number_of_processes_below_one_is_taken(tmp_path: Path, stories_file: Path):
    with pytest.raises(UserError, match="processes: found 0; a whole number of at least 1 is expected"):
        prepare([str(stories_file)], tmp_path / "out", processes=0, quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "signum, status, last",
    [
        (signal.SIGINT, 130, "avatarl: interrupted"),
        (signal.SIGTERM, 143, "avatarl: stopped, and nothing is left of it; the same command starts again"),
        (signal.SIGHUP, 129, "avatarl: stopped, and nothing is left of it; the same command starts again"),
        (signal.SIGKILL, -9, ""),
    ],
)
def test_a_command_that_is_stopped_leaves_no_process(
    tmp_path: Path, prepared, signum: signal.Signals, status: int, last: str
):
    """Each part is endless, for a test: some gigabytes in a file of a few megabytes.

    By a signal of its own, not one to the session, it is found waiting for a tokenizer's threads that wait for text.
    """
    source = tmp_path / "set"
    source.mkdir()
    for name in ("a", "b", "c"):
        (source / f"{name}.txt.gz").write_bytes(gzip.compress(b"a line of text\n" * 100_000) * 2000)
    out = tmp_path / "made" / "out"
    command = [sys.executable, "-m", "avatarl", "prepare", str(source), "--out", str(out), "--processes", "2"]
    command += ["--tokenizer", str(prepared.path / "tokenizer")] if signum == signal.SIGINT else []
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in tmp_path.rglob("read-*/*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(processes_of(running.pid)) >= 4  # itself, the server that forks, two that read
    running.send_signal(signum)
    _, said = running.communicate(timeout=30)
    assert running.returncode == status
    while processes_of(running.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not processes_of(running.pid)
    assert "".join(said.splitlines()[-1:]) == last and "Traceback" not in said
    assert (tmp_path / "made").exists() == (signum == signal.SIGKILL)
    story = tmp_path / "story.txt"
    story.write_text("one line of text after another\n" * 200)
    prepare([str(story)], out, tokenizer="bpe:300", quiet=True)
    assert os.listdir(tmp_path / "made") == ["out"]


def processes_of(session: int) -> list[str]:
    """The processes of a session that are alive."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session, *_ = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(its_session) == session and state != "Z":
            found.append(stat.parent.name)
    return found
