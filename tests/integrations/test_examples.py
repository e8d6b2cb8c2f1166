"""The examples run as they stand, and the same loop in two dresses takes the same steps."""

from __future__ import annotations

import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from avatarl.results import evaluate

from ..conftest import BLOCK

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZES = dict(steps=4, block_size=BLOCK, batch=4)


def main_of(name: str):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


@pytest.fixture(scope="module")
def cross_entropies(data_folder: Path, critic_folder: Path) -> list[float]:
    """Of the plain loop."""
    return main_of("plain_loop")(str(data_folder), str(critic_folder), **SIZES)


def test_the_plain_loop_learns(cross_entropies: list[float]):
    assert len(cross_entropies) == 4
    assert math.log(300) - 0.2 < cross_entropies[0] < math.log(300) + 0.2
    assert cross_entropies[-1] < cross_entropies[0] - 0.3


def test_fabric_takes_the_steps_of_the_plain_loop(cross_entropies: list[float], data_folder: Path, critic_folder: Path):
    found = main_of("fabric")(str(data_folder), str(critic_folder), **SIZES)
    assert found == pytest.approx(cross_entropies, rel=1e-6)


def test_a_cache_takes_the_steps_of_its_critic(cross_entropies: list[float], data_folder: Path, critic_cache: Path):
    found = main_of("plain_loop")(str(data_folder), str(critic_cache), **SIZES)
    assert found == pytest.approx(cross_entropies, rel=1e-3)


def test_trainer_leaves_a_player_that_others_evaluate_alike(data_folder: Path, critic_folder: Path, tmp_path: Path):
    found = main_of("trainer")(str(data_folder), str(critic_folder), str(tmp_path / "player"), **SIZES)
    expected = evaluate(tmp_path / "player", data_folder, critic=str(critic_folder))
    assert found["eval_cross_entropy"] == pytest.approx(expected["cross_entropy"], rel=1e-5)
    assert found["eval_expected_reward"] == pytest.approx(expected["rewards"]["expected_reward"], rel=1e-4)


@pytest.mark.slow
def test_fabric_with_two_processes_takes_the_steps_of_one(
    cross_entropies: list[float], data_folder: Path, critic_folder: Path
):
    command = [sys.executable, str(EXAMPLES / "fabric.py"), str(data_folder), str(critic_folder), "--devices", "2"]
    options = [f"--{name}={value}" for name, value in SIZES.items()]
    result = subprocess.run([*command, *options], capture_output=True, text=True, check=True, timeout=120)
    found = [float(line.split()[-1]) for line in result.stdout.splitlines() if line.startswith("step ")]
    assert found == pytest.approx(cross_entropies, abs=1e-4)
