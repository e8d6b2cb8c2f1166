"""Two processes under Trainer: the steps, logs and evaluations of one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from transformers import default_data_collator

from avatarl import UserError
from avatarl.data import PreparedData, Windows
from avatarl.integrations.transformers import AvataRLTrainer
from avatarl.training import TrainConfig

from ..conftest import BLOCK
from ..training.runs import weights_of
from .conftest import Rows, trainer_of


def halved(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Two rows of each example."""
    batch = default_data_collator(examples)
    half = batch["labels"].shape[1] // 2
    return {name: torch.cat([values[:, :half], values[:, -half:]]) for name, values in batch.items()}


def trained(config: TrainConfig, out: Path, rows: Tensor, processes: int) -> AvataRLTrainer:
    """A Trainer after three steps of four rows in micro-batches, on so many processes, and three evaluations.

    They are of seven rows, which two processes cannot share evenly, of one, so that a process has none, and of seven
    that become fourteen.
    """
    settings = dict(optim="sgd", learning_rate=0.1, max_grad_norm=0, max_steps=3, gradient_accumulation_steps=2)
    settings |= dict(per_device_train_batch_size=2 // processes, per_device_eval_batch_size=4 // processes)
    parts = dict(train_dataset=Rows(rows), eval_dataset=Rows(rows[:7]), optimizers=(None, None))
    trainer = trainer_of(config, out, settings, **parts)
    trainer.train()
    trainer.evaluate()
    trainer.evaluate(Rows(rows[:1]))
    trainer.data_collator = halved
    trainer.evaluate()
    trainer.save_model()
    return trainer


def process(rank: int, rendezvous: str, config: TrainConfig, out: Path, rows: Tensor) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # asked for, and not used by what is started already
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    with pytest.raises(UserError, match="fsdp is not supported; expected DDP"):
        trainer_of(config, out, {"fsdp": True})
    trainer = trained(config, out, rows, processes=2)
    assert trainer.accelerator.num_processes == 2
    (out / f"log-{rank}.json").write_text(json.dumps(trainer.state.log_history))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_as_one(tiny_config, tmp_path: Path, data_folder: Path):
    inputs, targets = Windows(PreparedData.open(data_folder).train, BLOCK).batch(range(12))
    rows = torch.cat([inputs, targets[:, -1:]], dim=1)
    config = tiny_config(tmp_path)
    mp.spawn(process, (str(tmp_path / "rendezvous"), config, tmp_path / "two", rows), nprocs=2)
    one = trained(config, tmp_path / "one", rows, processes=1)

    for rank in (0, 1):
        log = json.loads((tmp_path / "two" / f"log-{rank}.json").read_text())
        assert len(log) == 7  # three steps, the end of training, the evaluations
        for left, right in zip(log, one.state.log_history, strict=True):
            assert without_speed(left) == pytest.approx(without_speed(right), rel=1e-5)
    ours, theirs = weights_of(tmp_path / "two"), weights_of(tmp_path / "one")
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-6, msg=name)


def without_speed(line: dict) -> dict:
    return {name: value for name, value in line.items() if not name.endswith(("_runtime", "_second", "_flos"))}
