"""The recipe of OpenWebText, with a small text and small models in their places."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from avatarl.data import PreparedData

from .conftest import write_documents

SCRIPT = Path(__file__).parents[1] / "recipes" / "openwebtext.sh"
TINY = "--player.preset 1m --block_size 32 --micro_batch_size 2 --gradient_accumulation_steps 1"
TINY += " --steps 3 --eval_windows 2 --device cpu"
TINY += " --compile false --precision fp32 --tensorboard false"
RUNS = ["critic-30m", "article-30m", "cross-entropy-30m"]


def call(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = {**os.environ, "PATH": path, "HF_HOME": str(folder / "cache"), **environment}
    return subprocess.run(["bash", SCRIPT, *arguments], cwd=folder, env=settings, capture_output=True, text=True)


def test_an_unknown_size_is_refused_before_anything_is_made(tmp_path: Path):
    ended = call(tmp_path, "7b")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "openwebtext.sh: size is '7b'; expected 30m, 124m or 250m\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_recipe_prepares_trains_and_goes_on(tmp_path: Path):
    (tmp_path / "text").mkdir()
    for shard in range(3):
        write_documents(tmp_path / "text" / f"train-{shard}.jsonl", count=20, seed=shard)
    small = {"SOURCE": f"hub:{tmp_path}/text", "TOKENIZER": "bpe:300", "READERS": "2"}

    ended = call(tmp_path, "30m", *TINY.split(), **small)
    assert ended.returncode == 0, ended.stderr
    data = tmp_path / "data" / "openwebtext"
    assert PreparedData.open(data).manifest["documents"]["train"] > 50
    made = {}
    for name in RUNS:
        run = tmp_path / "runs" / name
        assert (run / "player" / "model.safetensors").is_file()
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert max(steps) == 3
        made[name] = (run / "metrics.jsonl").read_bytes()
    prepared = (data / "manifest.json").stat().st_mtime_ns

    # As if it had been stopped between the player and its twin.
    (tmp_path / "runs" / RUNS[-1]).rename(tmp_path / "taken away")
    ended = call(tmp_path, "30m", *TINY.split(), SOURCE="hub:nowhere")
    assert ended.returncode == 0, ended.stderr
    assert (data / "manifest.json").stat().st_mtime_ns == prepared
    for name in RUNS[:2]:
        assert (tmp_path / "runs" / name / "metrics.jsonl").read_bytes() == made[name]
    assert (tmp_path / "runs" / RUNS[-1] / "player" / "model.safetensors").is_file()
