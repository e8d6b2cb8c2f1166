"""A prepared folder, a critic and a configuration so small that a whole training run takes a second."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers

from avatarl.data import PreparedData
from avatarl.data.prepare import prepare
from avatarl.models import PlayerConfig, build_player, cache_critic
from avatarl.objective import AvataRLConfig, BaselineConfig
from avatarl.training import OptimConfig, TrainConfig

torch.set_num_threads(1)  # tiny products are slower on several threads, and far slower beside a busy process
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "head_dim": 8,
    "num_key_value_heads": 2,
}
TINY_PLAYER = PlayerConfig(settings=TINY)
BLOCK = 16


def write_documents(path: Path, count: int, seed: int) -> Path:
    """JSON lines of ``count`` documents of random words, in which some word pairs always come together."""
    rng = random.Random(seed)
    pairs = ["quick fox", "old oak", "blue sea", "cold night", "long road", "wise owl", "red barn", "tall ship"]
    documents = [" ".join(rng.choice(pairs) for _ in range(40)) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


def save_model(folder: Path, tokenizer, seed: int, factor: float, player: PlayerConfig = TINY_PLAYER) -> Path:
    """A model folder of random weights, its logits ``factor`` times as large so that it has opinions."""
    model = build_player(player, tokenizer, BLOCK, seed)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(factor)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is remembered of the tests' files is not remembered in the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache_home")))
        yield


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder with 300 tokens of vocabulary; some hundred windows of 16 to train on, a dozen to check."""
    folder = tmp_path_factory.mktemp("data")
    source = write_documents(folder / "documents.jsonl", count=60, seed=1)
    prepare([str(source)], folder / "prepared", tokenizer="bpe:300", valid_fraction=0.1, quiet=True)
    return folder / "prepared"


@pytest.fixture(scope="session")
def tokenizer(data_folder: Path) -> transformers.PreTrainedTokenizerBase:
    """The prepared folder's tokenizer."""
    return PreparedData.open(data_folder).load_tokenizer()


@pytest.fixture(scope="session")
def critic_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A critic: another random model of the same kind, its logits made large enough to have opinions."""
    return save_model(tmp_path_factory.mktemp("critic") / "model", tokenizer, seed=77, factor=20)


@pytest.fixture(scope="session")
def player_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A model that is not the critic, its logits large enough to be sure of some tokens."""
    return save_model(tmp_path_factory.mktemp("player") / "model", tokenizer, seed=5, factor=15)


@pytest.fixture(scope="session")
def critic_cache(tmp_path_factory: pytest.TempPathFactory, data_folder: Path, critic_folder: Path) -> Path:
    """All that the critic says of the prepared folder: its whole distribution, and so as good as the critic."""
    folder = tmp_path_factory.mktemp("cache") / "critic"
    every_token = 6 + 4 * 300
    cache_critic(
        str(critic_folder),
        data_folder,
        folder,
        block_size=BLOCK,
        bytes_per_token=every_token,
        precision="fp32",
        quiet=True,
    )
    return folder


@pytest.fixture(scope="session")
def tiny_config(data_folder: Path, critic_folder: Path) -> Callable[..., TrainConfig]:
    """``tiny_config(folder, **overrides)``: eight short steps into ``folder / "run"``."""

    def make(folder: Path, **overrides) -> TrainConfig:
        settings = dict(
            data=str(data_folder),
            out=str(folder / "run"),
            critic=str(critic_folder),
            avatarl=AvataRLConfig(top_k=4, threshold="none"),
            baseline=BaselineConfig(samples=3, ppo_refresh_every=3),
            player=TINY_PLAYER,
            optim=OptimConfig(learning_rate=1e-2, warmup_steps=2),
            block_size=BLOCK,
            micro_batch_size=4,
            steps=8,
            precision="fp32",
            device="cpu",
            eval_every_steps=4,
            eval_windows=4,
            log_every_steps=2,
            checkpoint_every_steps=4,
            tensorboard=False,
        )
        return TrainConfig(**{**settings, **overrides})

    return make
