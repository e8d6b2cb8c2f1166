"""Files of others: what moves under a reader is noticed, and what was hashed once is not hashed again."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import threading
import time
from pathlib import Path

import pytest

from avatarl import files
from avatarl.errors import RunFailed
from avatarl.files import File, ask

CONTENT = bytes(range(200)) * 7


def old(path: Path, seconds: float = 10) -> Path:
    """The file as if it had been written some time ago."""
    then = time.time_ns() - int(seconds * 1e9)
    os.utime(path, ns=(then, then))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "file.bin"
    path.write_bytes(CONTENT)
    return old(path)


@pytest.fixture(params=[0, 16], ids=["opened each time", "held"])
def file(request, path: Path, monkeypatch) -> File:
    """One that has been read from once."""
    monkeypatch.setattr(files, "MOST_HELD", File._held + request.param)
    file = File(path)
    file.sha256 = file.digest()
    return file


def write_keeping_its_time(path: Path, content: bytes) -> None:
    found = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def replace_by_another(path: Path) -> None:
    path.with_name("new").write_bytes(CONTENT[::-1])
    path.with_name("new").replace(path)


CHANGES = {
    "overwritten": lambda path: path.write_bytes(CONTENT[::-1]),
    "overwritten, with its old time": lambda path: write_keeping_its_time(path, CONTENT[::-1]),
    "cut": lambda path: os.truncate(path, 100),
    "emptied": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(CONTENT + b"more"),
}
NO_CHANGES = {
    "copied over itself": lambda path: path.write_bytes(CONTENT),
    "touched": lambda path: path.touch(),
    "another mode": lambda path: path.chmod(0o600),
    "linked": lambda path: path.with_name("link").hardlink_to(path),
    "moved away and back": lambda path: shutil.move(path.rename(path.with_name("away")), path),
}
GOES_AWAY = {"removed": Path.unlink, "replaced": replace_by_another}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_is_never_read_as_another(file: File, change: str):
    CHANGES[change](file.path)
    for read in (lambda: file.read(0, 10), file.check, lambda: file.read(300, 1000), file.digest):
        with pytest.raises(RunFailed, match=rf"^{file.path} has changed while it was in use; put it back as it was"):
            read()
    file.path.write_bytes(CONTENT)
    assert file.read(0, len(CONTENT)) == CONTENT


@pytest.mark.parametrize("change", NO_CHANGES)
def test_a_file_that_stays_the_same_is_read_on(file: File, change: str):
    NO_CHANGES[change](file.path)
    file.check()
    assert file.read(190, 100) == CONTENT[190:290]


@pytest.mark.parametrize("change", GOES_AWAY)
def test_a_file_that_is_held_is_read_on_when_its_name_goes(path: Path, change: str, caplog):
    file = File(path)
    file.sha256 = file.digest()
    GOES_AWAY[change](path)
    assert file.read(190, 100) == CONTENT[190:290]
    assert caplog.messages == [f"files of {path.parent} were removed or replaced; what was opened is still read"]


@pytest.mark.parametrize("change", GOES_AWAY)
def test_a_file_that_is_not_held_is_missed(path: Path, change: str, monkeypatch):
    monkeypatch.setattr(files, "MOST_HELD", 0)
    file = File(path)
    file.sha256 = file.digest()
    GOES_AWAY[change](path)
    with pytest.raises(RunFailed, match=rf"^{path} (cannot be read \(No such file|has changed while it was in use)"):
        file.read(190, 100)


def test_another_process_opens_a_file_for_itself(file: File):
    content = pickle.dumps(file)
    file.path.with_name("new").write_bytes(CONTENT[::-1])
    copy = pickle.loads(content)
    assert copy.read(0, 3) == CONTENT[:3]
    file.path.with_name("new").replace(file.path)
    with pytest.raises(RunFailed, match="has changed while it was in use"):
        pickle.loads(content).read(0, 3)


def test_few_of_many_files_stay_open(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(files, "MOST_HELD", File._held + 3)
    before = len(os.listdir("/proc/self/fd"))
    many = [File(tmp_path / str(number)) for number in range(20) if (tmp_path / str(number)).write_text(f"{number:5}")]
    for _ in range(2):
        assert [int(file.read(0, 5)) for file in many] == list(range(20))
        assert len(os.listdir("/proc/self/fd")) - before == 3
    many.clear()
    assert len(os.listdir("/proc/self/fd")) == before


# --- what is remembered -----------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Asked:
    """Asks for the SHA-256 of a file, and counts how often it is read for that."""

    def __init__(self, path: Path):
        self.path, self.times = path, 0

    def __call__(self, **options) -> str:
        (found,) = ask(self.path.parent, [(File(self.path), "sha256", self.find)], **options)
        assert found == File(self.path).digest()
        return found

    def find(self, file: File) -> str:
        self.times += 1
        return file.digest()


@pytest.fixture
def asked(path: Path, cache: Path) -> Asked:
    asked = Asked(path)
    asked()
    assert asked.times == 1
    return asked


def test_a_file_is_read_once(asked: Asked, cache: Path, monkeypatch):
    asked()
    monkeypatch.chdir(asked.path.parent)
    other = Asked(Path("file.bin"))  # by another name
    other()
    assert (asked.times, other.times) == (1, 0)
    assert [path.name for path in asked.path.parent.iterdir()] == ["file.bin"]
    assert len(list((cache / "avatarl" / "files").iterdir())) == 1


@pytest.mark.parametrize("change", CHANGES | NO_CHANGES)
def test_a_file_that_was_written_to_is_read_again(asked: Asked, change: str):
    (CHANGES | NO_CHANGES)[change](asked.path)
    asked()
    assert asked.times == 2


def test_asked_anew_it_is_read_again_and_remembered(asked: Asked):
    asked(anew=True)
    asked()
    assert asked.times == 2


@pytest.mark.parametrize("seconds, times", [(0, 2), (1, 2), (-100, 2), (3, 1)])
def test_a_file_that_has_just_been_written_is_not_remembered(path: Path, cache: Path, seconds: float, times: int):
    asked = Asked(old(path, seconds))
    asked()
    asked()
    assert asked.times == times


DAMAGES = {
    "another SHA-256": lambda memory: memory.write_bytes(
        re.sub(rb'"[0-9a-f]{64}"', b'"' + b"0" * 64 + b'"', memory.read_bytes())
    ),
    "no text": lambda memory: memory.write_bytes(b"\xff\x00" * 1000),
    "half of it": lambda memory: os.truncate(memory, memory.stat().st_size // 2),
    "nothing": lambda memory: os.truncate(memory, 0),
    "a folder": lambda memory: (memory.unlink(), memory.mkdir()),
    "a pipe": lambda memory: (memory.unlink(), os.mkfifo(memory)),
    "a file for its folder": lambda memory: (shutil.rmtree(memory.parent), memory.parent.write_text("")),
    "a link to nowhere": lambda memory: (memory.unlink(), memory.symlink_to("/dev/null/nowhere")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_memory_costs_only_time(asked: Asked, cache: Path, damage: str):
    (memory,) = (cache / "avatarl" / "files").iterdir()
    DAMAGES[damage](memory)
    asked()
    assert asked.times == 2


@pytest.mark.parametrize("home", ["", "/dev/null", "relative"])
def test_without_a_cache_folder_files_are_read_each_time(path: Path, home: str, monkeypatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    monkeypatch.setenv("HOME", "/dev/null")
    asked = Asked(path)
    asked()
    asked()
    assert asked.times == 2
    assert [each.name for each in tmp_path.iterdir()] == ["data"]


def test_a_full_disk_costs_only_time(path: Path, cache: Path, monkeypatch):
    def write(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "write", write)
    Asked(path)()


def test_several_at_once_read_a_file_once(path: Path, cache: Path, monkeypatch):
    asked, real = Asked(path), File.digest
    monkeypatch.setattr(File, "digest", lambda file: (time.sleep(0.1), real(file))[1])
    threads = [threading.Thread(target=asked) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asked.times == 1


def test_one_that_never_ends_is_not_waited_for(path: Path, cache: Path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE_SECONDS", 0.1)
    asked = Asked(path)
    with files._one_at_a_time(files._memory_of(path.parent), 0):
        asked()
    asked()
    assert asked.times == 1


def test_a_line_says_what_takes_long(path: Path, cache: Path, monkeypatch, caplog):
    asked = Asked(path)
    monkeypatch.setattr(files, "WORTH_A_LINE_BYTES", len(CONTENT))
    asked()
    asked()
    assert caplog.messages == [f"reading {path.parent} once to compare it with its SHA-256: 0.0 GB"]
    asked.path.write_bytes(CONTENT[1:])
    asked()
    assert len(caplog.messages) == 1
