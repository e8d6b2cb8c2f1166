"""What the tests of the integrations share: Trainer on the windows, weights and optimiser of a native run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from transformers import TrainingArguments

from avatarl.data import PreparedData, WindowOrder, Windows
from avatarl.integrations.transformers import AvataRLTrainer, PreparedWindows
from avatarl.models import CriticCache, build_player
from avatarl.training import TrainConfig
from avatarl.training.optim import build_optimisers, learning_rate_factor

from ..conftest import BLOCK


class Rows(Dataset):
    """Given rows, of which some labels are ignored: many in the first rows, few in the last."""

    def __init__(self, input_ids: Tensor):
        self.input_ids, self.labels = input_ids, input_ids.clone()
        for row, labels in enumerate(self.labels):
            labels[: max(0, 12 - row)] = -100

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}


def arguments_of(config: TrainConfig, out: Path, **settings) -> TrainingArguments:
    """Trainer's arguments that mean what ``config`` means, as far as Trainer has a word for it."""
    return TrainingArguments(
        **{
            "output_dir": str(out),
            "per_device_train_batch_size": config.micro_batch_size,
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "max_steps": config.steps,
            "max_grad_norm": config.optim.clip_norm,
            "bf16": config.precision == "bf16",
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "save_strategy": "no",
            "disable_tqdm": True,
            **settings,
        }
    )


def windows_of(config: TrainConfig, data: PreparedData) -> Dataset:
    """The windows of a native run, in its order."""
    windows = PreparedWindows(data, "train", config.block_size)
    order = WindowOrder(len(windows), config.seed)
    return Subset(windows, order.indices(0, config.steps * config.windows_per_step).tolist())


def trainer_of(config: TrainConfig, out: Path, settings: dict | None = None, **replaced) -> AvataRLTrainer:
    """A Trainer that is to take the steps of a native run; ``settings`` are Trainer's, ``replaced`` its parts."""
    data = PreparedData.open(config.data)
    tokenizer = data.load_tokenizer()
    player = build_player(config.player, tokenizer, config.block_size, config.seed)
    optimiser = build_optimisers(player, config.optim, config.steps).optimisers[0]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: learning_rate_factor(step, config.optim, config.steps)
    )
    parts = dict(
        args=arguments_of(config, out, **(settings or {})),
        critics=config.critics,
        objective=config.objective,
        avatarl=config.avatarl,
        baseline=config.baseline,
        processing_class=tokenizer,
        train_dataset=windows_of(config, data),
        eval_dataset=PreparedWindows(data, "valid", config.block_size),
        optimizers=(optimiser, schedule),
    )
    return AvataRLTrainer(**{"model": player, **parts, **replaced})


def train_lines(trainer: AvataRLTrainer) -> list[dict[str, float]]:
    """What was logged of training."""
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return [{name: value for name, value in line.items() if name != "epoch"} for line in lines]


def eval_lines(trainer: AvataRLTrainer) -> list[dict[str, float]]:
    """What was logged of evaluations, under the native names."""
    lines = [line for line in trainer.state.log_history if "eval_loss" in line]
    return [{name.removeprefix("eval_"): value for name, value in line.items()} for line in lines]


def native_lines(run: Path, event: str) -> list[dict[str, float]]:
    """The lines of a native run, without what Trainer does not log."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    left_out = ("event", "tokens", "player_flops", "critic_flops", "tokens_per_second", "skipped_steps", "seconds")
    return [
        {name: value for name, value in line.items() if name not in left_out}
        for line in lines
        if line["event"] == event
    ]


@pytest.fixture
def make_trainer(tiny_config, tmp_path: Path) -> Callable[..., AvataRLTrainer]:
    """``make_trainer(settings, **parts)``: a Trainer on the tiny data; four steps of four windows."""

    def make(settings: dict | None = None, **parts) -> AvataRLTrainer:
        return trainer_of(tiny_config(tmp_path, steps=4), tmp_path / "trainer", settings, **parts)

    return make


@pytest.fixture(scope="session")
def cache(data_folder: Path, critic_cache: Path) -> CriticCache:
    """The critic's whole distribution at every position."""
    return CriticCache.open(critic_cache, PreparedData.open(data_folder), BLOCK)


@pytest.fixture
def rows(data_folder: Path) -> Rows:
    """Twelve windows of training."""
    inputs, targets = Windows(PreparedData.open(data_folder).train, BLOCK).batch(range(12))
    return Rows(torch.cat([inputs, targets[:, -1:]], dim=1))
