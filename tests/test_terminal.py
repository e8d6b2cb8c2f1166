"""What surrounds a command: terminals that cannot show everything, readers that leave, what launchers set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from avatarl import UserError
from avatarl.cli import COMMANDS, main
from avatarl.device import launched_as
from avatarl.models import cache_critic
from avatarl.training import train
from avatarl.training.processes import Processes

from .conftest import BLOCK

AVATARL = [sys.executable, "-m", "avatarl"]


@pytest.mark.parametrize(
    "encoding", ["latin-1", *(pytest.param(each, marks=pytest.mark.slow) for each in ("ascii", "utf-8"))]
)
def test_what_a_terminal_cannot_show_is_escaped(critic_folder: Path, encoding: str):
    command = [*AVATARL, "generate", str(critic_folder), "--prompt", "漢é", "--max_new_tokens", "1", "--device", "cpu"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    expected = {"latin-1": "\\u6f22é", "ascii": "\\u6f22\\xe9", "utf-8": "漢é"}[encoding]
    assert done.stdout.decode(encoding).startswith(expected)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], pytest.param(["train", "--help"], marks=pytest.mark.slow), ["generate"]],
    ids=["help", "a command's help", "generate"],
)
def test_a_reader_that_has_enough_ends_a_command_without_a_word(critic_folder: Path, arguments: list[str]):
    if arguments == ["generate"]:
        arguments = ["generate", str(critic_folder), "--samples", "300", "--max_new_tokens", "10", "--device", "cpu"]
    process = subprocess.Popen([*AVATARL, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    _, said = process.communicate(timeout=120)
    assert said == b"" and process.returncode in (0, 141)


def test_another_pipe_that_breaks_is_an_error_as_any_other(monkeypatch, capsys):
    def fail(*_) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setitem(COMMANDS, "push", SimpleNamespace(run=fail))
    assert main(["push"]) == 1
    assert capsys.readouterr().err == "avatarl: BrokenPipeError: [Errno 32] Broken pipe\n"


# --- what torchrun sets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"WORLD_SIZE": "", "RANK": "", "LOCAL_RANK": " "}, (0, 1, 0)),
        ({"WORLD_SIZE": "1", "RANK": "3", "LOCAL_RANK": "3"}, (0, 1, 0)),  # of a scheduler that starts one
        ({"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": ""}, (2, 4, 0)),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}, (3, 4, 1)),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' in the environment; expected a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK is '-1' in the environment; expected a whole number"),
        ({"LOCAL_RANK": "0.5"}, "LOCAL_RANK is '0.5' in the environment; expected a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2 in the environment, and WORLD_SIZE is 2; expected a rank below"),
    ],
)
def test_a_process_is_what_the_environment_says(
    monkeypatch, tiny_config, tmp_path: Path, critic_folder, data_folder, environment: dict, expected: tuple | str
):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, tuple):
        assert launched_as() == expected
        processes = Processes.of_this_run()
        assert (processes.rank, processes.count, processes.local_rank) == expected
        return
    for start in (
        lambda: train(tiny_config(tmp_path), quiet=True),
        lambda: cache_critic(str(critic_folder), data_folder, tmp_path / "cache", block_size=BLOCK, quiet=True),
    ):
        with pytest.raises(UserError, match=expected):
            start()
    assert not any(tmp_path.iterdir())


def test_a_cache_is_whole_whatever_rank_a_process_alone_has(monkeypatch, tmp_path: Path, critic_folder, data_folder):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "")
    done = cache_critic(str(critic_folder), data_folder, tmp_path / "cache", block_size=BLOCK, device="cpu", quiet=True)
    assert "files" in done


def test_several_processes_need_what_else_a_launcher_sets(monkeypatch, tiny_config, tmp_path: Path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE is 2 in the environment; .*MASTER_ADDR.*; start by torchrun"):
        train(tiny_config(tmp_path), quiet=True)


@pytest.mark.parametrize("rank", ["", "0", None])
def test_the_first_process_does_not_say_that_it_is_one(monkeypatch, capsys, rank: str | None):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank) if rank is not None else monkeypatch.delenv("RANK", raising=False)
    assert main(["bogus"]) == 2
    assert capsys.readouterr().err.startswith("avatarl: command is 'bogus'")
