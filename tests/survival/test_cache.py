"""A cache that is killed while it is made is the same to the byte in the end, and so is one that two processes make."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ..conftest import BLOCK

pytestmark = pytest.mark.slow

# The command line in parts of two kilobytes or so, of which the tiny data has hundreds.
PROGRAM = """
import sys
from avatarl.models.critic_cache import parts
parts.SMALLEST_PART_BYTES = 1 << 11
from avatarl.cli import main
sys.exit(main(sys.argv[1:]))
"""
KILLS = 5


def arguments(critic: Path, data: Path, out: Path) -> list[str]:
    settings = ["--kind", "sample", "--keep_top", "3", "--bytes_per_token", "70", "--micro_batch_size", "1"]
    where = ["--critic", str(critic), "--data", str(data), "--out", str(out), "--device", "cpu", "--precision", "fp32"]
    return ["critic", "cache", *where, "--block_size", str(BLOCK), *settings]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_kills(tmp_path: Path, critic_folder: Path, data_folder: Path):
    command = [sys.executable, "-c", PROGRAM]
    subprocess.run([*command, *arguments(critic_folder, data_folder, tmp_path / "whole")], check=True, timeout=120)
    assert len(contents(tmp_path / "whole")) > 100
    draw, out = random.Random(7), tmp_path / "killed"
    reached = []
    for _ in range(KILLS):
        before = len(list(out.glob("*.bin"))) if out.exists() else 0
        process = subprocess.Popen([*command, *arguments(critic_folder, data_folder, out)], stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(out.glob("*.bin"))) <= before:
            time.sleep(0.001)
        time.sleep(draw.random() * 0.1)  # some parts later
        process.send_signal(signal.SIGKILL)
        assert process.wait() in (-signal.SIGKILL, 0)
        reached.append(len(list(out.glob("*.bin"))) if out.exists() else 0)
    assert reached == sorted(reached) and 0 < reached[0] < reached[-1]
    subprocess.run([*command, *arguments(critic_folder, data_folder, out)], check=True, timeout=120)
    assert contents(out) == contents(tmp_path / "whole")


def test_two_processes_of_torchrun(tmp_path: Path, critic_folder: Path, data_folder: Path):
    command = [sys.executable, "-c", PROGRAM]
    subprocess.run([*command, *arguments(critic_folder, data_folder, tmp_path / "one")], check=True, timeout=120)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    shared = arguments(critic_folder, data_folder, tmp_path / "two")
    subprocess.run([*launcher, *shared], check=True, timeout=240, env=environment)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
