"""The files of recipes/cluster and the commands of docs/many-processes.md name only what exists."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from avatarl import cli
from avatarl.options import add_function, make_parser
from avatarl.training import train

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "recipes" / "cluster"
PAGE = ROOT / "docs" / "many-processes.md"
SKYPILOT = FOLDER / "skypilot.yaml"
SCRIPTS = sorted([*FOLDER.glob("*.sh"), *FOLDER.glob("*.sbatch")])
ENDS = {"&", "&&", "||", ";", "|"}


def shell_texts() -> dict[str, str]:
    """Every piece of shell by a name for it."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in SCRIPTS}
    sky = yaml.safe_load(SKYPILOT.read_text(encoding="utf-8"))
    texts |= {f"skypilot.yaml {part}": sky[part] for part in ("setup", "run")}
    blocks = re.findall(r"^```\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    return texts | {f"many-processes.md {number}": text for number, text in enumerate(blocks, 1)}


def commands(text: str) -> list[list[str]]:
    """The words of each command line of a piece of shell, without comments."""
    lines = (line for line in text.replace("\\\n", " ").splitlines() if not line.lstrip().startswith("#"))
    return [shlex.split(line, comments=True) for line in lines if "torchrun " in line or "avatarl " in line]


def words_after(name: str, words: list[str]) -> list[str]:
    """What a command is called with: the words from its name to the end of the command."""
    words = words[words.index(name) + 1 :]
    return words[: next((at for at, word in enumerate(words) if word in ENDS), len(words))]


SHELL = shell_texts()
TORCHRUNS = {
    f"{name} {at}": words_after("torchrun", words)
    for name, text in SHELL.items()
    for at, words in enumerate(commands(text))
    if "torchrun" in words
}
TRAININGS = {name: words_after("train", words) for name, words in TORCHRUNS.items()}


def train_options() -> set[str]:
    """The options of ``avatarl train``."""
    parser = make_parser("avatarl train", None)
    add_function(parser, train, skip=cli.NOT_OPTIONS)
    return {option for action in parser._actions for option in action.option_strings}


def test_the_commands_are_found():
    assert [path.name for path in SCRIPTS] == ["one-node.sh", "several-nodes.sh", "slurm.sbatch"]
    assert {name.split()[0] for name in TORCHRUNS} == {path.name for path in [*SCRIPTS, SKYPILOT, PAGE]}


@pytest.mark.parametrize("name", SHELL)
def test_the_shell_is_valid(name: str):
    checked = subprocess.run(["bash", "-n"], input=SHELL[name], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("name", TORCHRUNS)
def test_torchrun_knows_its_options_and_leaves_ours_alone(name: str):
    parser = get_args_parser()
    words = TORCHRUNS[name]
    ours = words.index("-m")
    for word in words[:ours]:
        assert not word.startswith("-") or word in parser._option_string_actions
    parsed = parser.parse_args(words)
    assert parsed.module and parsed.training_script == "avatarl"
    assert parsed.training_script_args == words[ours + 2 :]
    assert parsed.standalone != (parsed.rdzv_backend == "c10d")
    assert parsed.max_restarts == 3


@pytest.mark.parametrize("name", TRAININGS)
def test_train_knows_its_options(name: str):
    words = TRAININGS[name]
    assert "--resume" in words
    assert "--config" in words or "$@" in words
    assert {word for word in words if word.startswith("-")} <= train_options()


def test_settings_on_the_page_are_train_s():
    tables = re.findall(r"`(--[a-z_]+ [^`]*)`", PAGE.read_text(encoding="utf-8"))
    settings = [words for words in tables if words.startswith("--parallel")]
    assert len(settings) == 3
    assert {word for words in settings for word in words.split() if word.startswith("--")} <= train_options()


def test_recipes_and_files_that_are_named_exist():
    named = set()
    for path in [*SCRIPTS, SKYPILOT, PAGE]:
        named |= set(re.findall(r"recipes/[\w/.-]+\.(?:yaml|sbatch|sh)", path.read_text(encoding="utf-8")))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_the_save_has_less_time_than_slurm_leaves():
    text = (FOLDER / "slurm.sbatch").read_text(encoding="utf-8")
    warned = int(re.search(r"^#SBATCH --signal=B:USR1@(\d+)$", text, re.M)[1])
    words = next(words for name, words in TORCHRUNS.items() if name.startswith("slurm"))
    assert int(words[words.index("--shutdown_timeout") + 1]) <= warned - 60


STAND_INS = {
    "scontrol": 'if [ "$1" = show ]; then echo node1; else echo "scontrol $*" >> calls; fi',
    "scancel": 'echo "scancel $*" >> calls; kill -TERM "$(cat step)"',
    # Like a torchrun that is asked to stop: it saves, and ends with 1.
    "srun": """echo "srun $*" >> calls; echo $$ > step
trap 'echo saved >> calls; exit 1' TERM
while [ ! -e finished ]; do sleep 0.05; done; exit "$(cat finished)" """,
}


@pytest.fixture
def batch(tmp_path: Path):
    """slurm.sbatch, running among stand-ins for SLURM's commands in a folder of its own."""
    for name, body in STAND_INS.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        program.chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    slurm = {"JOB_ID": "7", "JOB_NODELIST": "node[1-2]", "NNODES": "2", "GPUS_PER_NODE": "8", "CPUS_PER_TASK": "32"}
    environment = {f"SLURM_{name}": value for name, value in slurm.items()}
    process = subprocess.Popen(
        ["bash", FOLDER / "slurm.sbatch", "--config", "recipe with spaces.yaml"],
        cwd=tmp_path,
        env=os.environ | environment | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
    )
    deadline = time.monotonic() + 20
    while not (tmp_path / "step").exists() or not (tmp_path / "step").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.2)  # the stand-in sets its trap, and the shell comes to its wait
    yield process, tmp_path
    (tmp_path / "finished").write_text("0", encoding="utf-8")
    process.wait(timeout=20)


def calls_of(folder: Path) -> list[str]:
    return (folder / "calls").read_text(encoding="utf-8").splitlines()


def test_at_the_time_limit_the_run_saves_before_it_is_queued_again(batch):
    process, folder = batch
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=20) == 1
    started, *rest = calls_of(folder)
    assert "--nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint node1:29400 --rdzv_id 7" in started
    assert started.endswith("-m avatarl train --config recipe with spaces.yaml --resume")
    assert rest == ["scancel --signal=TERM 7", "saved", "scontrol requeue 7"]


@pytest.mark.parametrize("status", [0, 1])
def test_a_run_that_ends_by_itself_is_not_queued_again(batch, status: int):
    process, folder = batch
    (folder / "finished").write_text(str(status), encoding="utf-8")
    assert process.wait(timeout=20) == status
    assert len(calls_of(folder)) == 1
