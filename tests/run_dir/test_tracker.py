"""A run in a tracker: the same one after an interruption, no step twice, and no run that ends because of it."""

from __future__ import annotations

import importlib
import json
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from avatarl import UserError
from avatarl.run_dir.tracker import RECORD, check_tracker, read_record
from avatarl.training import TrainConfig, train
from avatarl.training.validation import Validation

from ..training.runs import Interrupted, lines_of

# A library with the few calls, which writes down how it was called and can be told to fail.
LIBRARY = """
import json
from pathlib import Path

CALLS = Path(__file__).with_name("calls.jsonl")
fails_at = None

class Run:
    url = "https://tracker.example/run"

def call(name, *values):
    if name == fails_at:
        raise ConnectionError("no network\\nat all")
    with CALLS.open("a") as file:
        file.write(json.dumps([name, *values]) + "\\n")

def init(project, name, config, resume, embed):
    print("* chatter")
    call("init", project, name, config, resume)
    return Run()

def log(values, step):
    call("log", step, values)

def finish():
    print("* chatter")
    call("finish")
"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch):
    """The module that answers to ``import trackio``."""
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "trackio.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(tmp_path / "library")
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    yield importlib.import_module("trackio")
    del sys.modules["trackio"]


@pytest.fixture
def tracked(tiny_config, tmp_path: Path) -> Callable[..., TrainConfig]:
    """``tracked(**settings)``: a tracked run in ``tmp_path / "run"``."""

    def make(**settings) -> TrainConfig:
        return tiny_config(tmp_path, **{"objective": "cross_entropy", "critic": None, "tracker": "trackio", **settings})

    return make


def calls_of(library) -> list[list]:
    return [json.loads(line) for line in library.CALLS.read_text().splitlines()]


def logged(library) -> list[tuple[str, int]]:
    """Event and step of what was logged, in order."""
    return [(next(iter(call[2])).partition("/")[0], call[1]) for call in calls_of(library) if call[0] == "log"]


def events_of(run: Path) -> list[tuple[str, int]]:
    return [(line["event"], line["step"]) for line in lines_of(run)]


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(tracked, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not there
    with pytest.raises(UserError, match=r"^tracker is 'wandb', which is not installed; pip install 'avatarl\[wandb\]'"):
        train(tracked(tracker="wandb"), quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_called_like_a_tracker_is_none(tmp_path: Path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="not installed"):
        check_tracker("wandb")


def test_another_name_is_refused(tracked, tmp_path: Path):
    with pytest.raises(UserError, match="tracker is 'mlflow'; expected one of 'trackio', 'wandb'"):
        tracked(tracker="mlflow")


def test_a_tracker_gets_every_number_of_the_metrics(tracked, tmp_path: Path, library, capfd):
    config = tracked()
    train(config)
    (_, project, name, settings, _), *logs, last = calls_of(library)
    assert project == "avatarl" and name.startswith("run-") and settings == config.as_dict() and last == ["finish"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert logs == [
        ["log", line["step"], {f"{line['event']}/{k}": v for k, v in line.items() if k not in ("event", "step")}]
        for line in lines
    ]
    # FLOPs soon have more than 64 bits, which is all that a tracker may keep a whole number in.
    assert all(isinstance(value, float) for _, _, values in logs for value in values.values())
    out, err = capfd.readouterr()
    assert out == "" and "chatter" not in err
    assert f"trackio tracks the run as avatarl/{name}, https://tracker.example/run\n" in err
    before = calls_of(library)
    train(config, resume=True, quiet=True)  # which is finished
    assert calls_of(library) == before


def test_a_resumed_run_goes_on_in_the_tracker_and_logs_no_step_twice(tracked, tmp_path, library, interrupt):
    """Stopped at 7, again at 5 and at the end; the checkpoint is that of step 4."""
    config = tracked(log_every_steps=1)
    whole = [(event, step) for step in range(1, 9) for event in ("train", "eval") if event == "train" or step in (4, 8)]
    for steps_taken in (7, 2):
        interrupt(steps_taken)
        with pytest.raises(Interrupted):
            train(config, resume=True, quiet=True)
    train(config, resume=True, quiet=True)
    assert logged(library) == whole
    starts = [call for call in calls_of(library) if call[0] == "init"]
    assert len(starts) == 3 and len({name for _, _, name, *_ in starts}) == 1
    assert all(resume == "allow" for *_, resume in starts)


def test_an_evaluation_that_was_interrupted_is_logged_later(tracked, tmp_path: Path, library, monkeypatch):
    config = tracked(eval_every_steps=3)
    real, calls = Validation.evaluate, iter([True, False])

    def evaluate(*arguments):
        if next(calls, True):
            return real(*arguments)
        raise Interrupted  # at step 6, whose line of training is there

    monkeypatch.setattr(Validation, "evaluate", evaluate)
    with pytest.raises(Interrupted):
        train(config, quiet=True)
    assert logged(library)[-1] == ("train", 6)
    train(config, resume=True, quiet=True)
    assert logged(library) == events_of(tmp_path / "run")


def test_a_start_at_step_0_is_another_run_in_the_tracker(tracked, tmp_path: Path, library, interrupt):
    config = tracked()
    interrupt(3)
    with pytest.raises(Interrupted):
        train(config, quiet=True)
    train(config, resume=True, quiet=True)  # no checkpoint was there yet
    first, second = (call[2] for call in calls_of(library) if call[0] == "init")
    assert first != second
    assert logged(library) == [("train", 2), *events_of(tmp_path / "run")]


@pytest.mark.parametrize("fails_at", ["init", "log", "finish"])
def test_a_tracker_that_fails_ends_no_run(tracked, tmp_path: Path, library, capfd, fails_at: str):
    library.fails_at = fails_at
    assert train(tracked())["steps"] == 8
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [2, 4, 4, 6, 8, 8]
    assert capfd.readouterr().err.count("trackio no longer tracks the run (no network at all)\n") == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"library": "trackio", "name": "x", "logged": 5}', b"\xff"])
def test_a_damaged_record_is_none(tmp_path: Path, content: bytes):
    (tmp_path / RECORD).write_bytes(content)
    assert read_record(tmp_path / RECORD) is None


def test_without_its_record_another_run_begins_in_the_tracker(tracked, tmp_path: Path, library, interrupt):
    config = tracked()
    interrupt(7)
    with pytest.raises(Interrupted):
        train(config, quiet=True)
    (tmp_path / "run" / RECORD).unlink()
    train(config, resume=True, quiet=True)
    first, second = (call[2] for call in calls_of(library) if call[0] == "init")
    assert first != second and logged(library)[-1] == ("eval", 8)


# --- the libraries themselves, where they are installed -------------------------------------------------------------


def test_trackio_holds_every_step_once(tracked, tmp_path: Path, interrupt, monkeypatch, capfd):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "tracked"))  # read when it is imported
    pytest.importorskip("trackio", reason="trackio is not installed")
    from trackio.sqlite_storage import SQLiteStorage

    events, name = interrupted_and_resumed(tracked(), interrupt)
    assert capfd.readouterr() == ("", "")
    found = SQLiteStorage.get_logs("avatarl", name)
    assert [("eval" if "eval/loss" in line else "train", line["step"]) for line in found] == events
    assert found[-1]["eval/cross_entropy"] == lines_of(tmp_path / "run")[-1]["cross_entropy"]


def test_wandb_holds_every_step_once(tracked, tmp_path: Path, interrupt, monkeypatch, capfd):
    """Offline every start has a folder; wandb joins what has one step."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    pytest.importorskip("wandb", reason="wandb is not installed")
    events, name = interrupted_and_resumed(tracked(tracker="wandb"), interrupt)
    assert capfd.readouterr() == ("", "")
    folders = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{name}"))
    history = [line for folder in folders for line in wandb_history(folder / f"run-{name}.wandb")]
    assert len(folders) == 2
    assert [int(line["_step"]) for line in history] == sorted({step for _, step in events})
    assert [int(line["_step"]) for line in history if "eval/cross_entropy" in line] == [4, 8]
    assert float(history[-1]["eval/cross_entropy"]) == lines_of(tmp_path / "run")[-1]["cross_entropy"]


def interrupted_and_resumed(config, interrupt: Callable[[int], None]) -> tuple[list[tuple[str, int]], str]:
    """Train in two parts; the lines of metrics by event and step, and the name in the tracker."""
    interrupt(7)
    with pytest.raises(Interrupted):
        train(config, quiet=True)
    train(config, resume=True, quiet=True)
    run = Path(config.out)
    return events_of(run), json.loads((run / RECORD).read_text())["name"]


def wandb_history(path: Path) -> Iterator[dict[str, str]]:
    """The lines of an offline run, values as JSON: records in LevelDB's log format, which here fit into one block."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at = path.read_bytes(), 7  # after the file's own header
    assert len(content) < 32768
    while at < len(content):
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])  # checksum, bytes, 1 for a whole record
        assert kind == 1
        record = Record.FromString(content[at + 7 : at + 7 + length])
        at += 7 + length
        if record.HasField("history"):
            yield {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
