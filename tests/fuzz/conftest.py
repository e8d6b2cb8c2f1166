"""Good input of every kind, as small as it can be: what the fuzzing damages."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml

from avatarl.models import build_player, cache_critic
from avatarl.training import TrainConfig, train

from ..conftest import BLOCK, TINY, TINY_PLAYER, write_documents
from .harness import limits, watch

__all__ = ["limits", "watch"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder are run by ``make test-fuzz`` alone."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("fuzz")


@pytest.fixture(scope="session")
def good_model(player_folder: Path) -> Path:
    """A model folder with its weights in one file."""
    return player_folder


@pytest.fixture(scope="session")
def good_sharded_model(tmp_path_factory, tokenizer) -> Path:
    """A model folder with its weights in several files and an index."""
    folder = tmp_path_factory.mktemp("good-sharded-model") / "model"
    build_player(TINY_PLAYER, tokenizer, BLOCK, seed=5).save_pretrained(folder, max_shard_size="12KB")
    tokenizer.save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


@pytest.fixture(scope="session")
def good_cache(tmp_path_factory, data_folder: Path, critic_folder: Path) -> Path:
    """A small cache of both kinds of tokens."""
    folder = tmp_path_factory.mktemp("good-cache") / "cache"
    settings = dict(kind="sample", keep_top=4, bytes_per_token=30, precision="fp32", quiet=True)
    cache_critic(str(critic_folder), data_folder, folder, block_size=BLOCK, **settings)
    return folder


@pytest.fixture(scope="session")
def good_openai_tokenizer(tmp_path_factory, data_folder: Path) -> Path:
    """The data's tokenizer under the names that OpenAI gave the files of GPT-2's."""
    folder = tmp_path_factory.mktemp("good-openai-tokenizer") / "tokenizer"
    folder.mkdir()
    model = json.loads((data_folder / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "encoder.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "vocab.bpe").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def good_sources(tmp_path_factory, data_folder: Path) -> Path:
    """One small file of every kind that text comes in, a folder of nanoGPT's, and a tokenizer."""
    folder = tmp_path_factory.mktemp("good-sources") / "sources"
    folder.mkdir()
    documents = write_documents(folder / "text.jsonl", count=6, seed=3)
    texts = [json.loads(line)["text"] for line in documents.read_text(encoding="utf-8").splitlines()]
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    (folder / "text.md").write_text("# Ä title\n\n" + "\r\n".join(texts), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "id": range(6)}), folder / "text.parquet")
    for name in ("text.jsonl", "text.txt", "text.parquet"):
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes(), mtime=0))
    (folder / "nanogpt").mkdir()
    for name in ("train.bin", "val.bin"):
        (np.arange(200) % 300).astype("<u2").tofile(folder / "nanogpt" / name)
    shutil.copytree(data_folder / "tokenizer", folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def good_run(tmp_path_factory) -> Path:
    """A run folder with metrics of three steps."""
    folder = tmp_path_factory.mktemp("good-run") / "run"
    folder.mkdir()
    lines = []
    for step in (1, 2, 3):
        common = {"step": step, "tokens": step * 1000}
        shares = {"expected_reward_share": 0.1 * step, "other_reward_share": 0.01}
        lines += [{"event": "train", **common, "loss": 5.0 - step, **shares}]
        lines += [{"event": "eval", **common, "cross_entropy": 5.5 - step}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def run_config(tmp_path_factory, tiny_config) -> TrainConfig:
    """What the good run folder was made by."""
    return tiny_config(tmp_path_factory.mktemp("good-run-folder"), steps=4, keep_last=1)


@pytest.fixture(scope="session")
def good_run_folder(run_config: TrainConfig) -> Path:
    """A finished run with one checkpoint."""
    train(run_config, quiet=True)
    return Path(run_config.out)


@pytest.fixture(scope="session")
def good_recipe(tmp_path_factory) -> Path:
    """A recipe with every setting written out, as a run saves it; its data folder does not exist."""
    folder = tmp_path_factory.mktemp("good-recipe") / "recipe"
    folder.mkdir()
    config = TrainConfig(data="missing", out="run", steps=3, player=TINY_PLAYER, critic=["missing"], device="cpu")
    assert config.player.settings == TINY
    (folder / "recipe.yaml").write_text(yaml.safe_dump(config.as_dict(), sort_keys=False), encoding="utf-8")
    return folder
