"""What the tests of training share: interrupting a run, and comparing two."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from avatarl.models import PlayerConfig

from ..conftest import TINY

# What each line of metrics says was spent until its step, in this order.
SPENT = ("tokens", "player_flops", "critic_flops")


class Interrupted(Exception):
    """Stands for whatever ends a run in the middle."""


def lines_of(run: Path) -> list[dict]:
    """The lines of metrics.jsonl without the speed, which no two runs share."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def weights_of(model_folder: Path) -> dict[str, Tensor]:
    weights = load_file(model_folder / "model.safetensors")
    return {name: tensor.clone() for name, tensor in weights.items()}  # which lie in the file's own memory


def assert_same_weights(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def contents_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file's bytes and time of change."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def with_dropout() -> PlayerConfig:
    return PlayerConfig(settings={**TINY, "attention_dropout": 0.1})
