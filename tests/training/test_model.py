"""The loss inside DDP, FSDP2 and gradient checkpointing: the gradients of one plain process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from avatarl.models.critics import FrozenModel
from avatarl.objective import OBJECTIVES, Objective, make_objective
from avatarl.training.model import PlayerWithLoss
from avatarl.training.processes import Processes

VOCABULARY, BLOCK, WINDOWS, PROCESSES = 40, 8, 4, 2


def small_llama(seed: int, width: int, tied: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY + 3,  # padded
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=BLOCK,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def build_model(objective: str, tied: bool) -> PlayerWithLoss:
    return PlayerWithLoss(small_llama(0, 32, tied), make_objective(objective), VOCABULARY)


def answers_of(objective: Objective, inputs: Tensor, tied: bool) -> dict:
    """What a critic, and the snapshot where there is one, answer for inputs."""
    critic, snapshot = FrozenModel(small_llama(1, 16, tied=True)), FrozenModel(small_llama(4, 32, tied))
    return dict(answers=[critic(inputs)], snapshot=snapshot(inputs) if objective.needs_snapshot else None)


def windows() -> tuple[Tensor, Tensor]:
    """Inputs and targets (WINDOWS, BLOCK); some targets are ignored, not the same number in each half."""
    tokens = torch.randint(VOCABULARY, (WINDOWS, BLOCK + 1), generator=torch.Generator().manual_seed(2))
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, :5] = -100
    return inputs, targets


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """By parameter name; sharded ones gathered."""
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        found[name.removeprefix("module.")] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return found


def uniforms(objective: Objective) -> Tensor | None:
    """Draws for every position (WINDOWS · BLOCK, S), for the objectives that sample."""
    if objective.num_uniforms == 0:
        return None
    return torch.rand(WINDOWS * BLOCK, objective.num_uniforms, generator=torch.Generator().manual_seed(3))


def plain_gradients(objective: str, tied: bool) -> dict[str, Tensor]:
    model = build_model(objective, tied)
    inputs, targets = windows()
    answers = answers_of(model.objective, inputs, tied)
    loss, _ = model(inputs, targets, num_valid=(targets != -100).sum(), uniforms=uniforms(model.objective), **answers)
    loss.backward()
    return gradients_of(model)


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert (found[name] - gradient).abs().max() < 1e-5 * gradient.abs().max(), name


def one_process_of_two(rank: int, rendezvous: str, cases: list[tuple[str, str, bool]]) -> None:
    """Each process has half of the windows and must find the gradients of them all."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=PROCESSES)
    processes = Processes(rank, PROCESSES, rank)
    inputs, targets = (part.chunk(PROCESSES)[rank] for part in windows())
    num_valid = (targets != -100).sum()
    dist.all_reduce(num_valid)
    for wrapper, objective, tied in cases:
        model = build_model(objective, tied)
        if wrapper == "fsdp":
            processes.shard(model, model.player, torch.device("cpu"))
        wrapped = processes.wrap(model, wrapper, torch.device("cpu"))
        draws = uniforms(model.objective)
        draws = draws if draws is None else draws.chunk(PROCESSES)[rank]
        answers = answers_of(model.objective, inputs, tied)
        # Wrappers take the mean over processes.
        loss, _ = wrapped(inputs, targets, num_valid=num_valid / PROCESSES, uniforms=draws, **answers)
        loss.backward()
        assert_same_gradients(gradients_of(wrapped), plain_gradients(objective, tied))
    dist.destroy_process_group()


def test_ddp_and_fsdp2_find_the_gradients_of_one_process(tmp_path: Path):
    names = [(objective, tied) for objective in sorted(OBJECTIVES) for tied in (True, False)]
    cases = [(wrapper, *name) for wrapper in ("ddp", "fsdp") for name in names]
    mp.spawn(one_process_of_two, (str(tmp_path / "rendezvous"), cases), nprocs=PROCESSES)


@pytest.mark.parametrize("tied", [True, False])
def test_gradient_checkpointing_changes_nothing(tied: bool):
    model = build_model("avatarl", tied)
    model.player.gradient_checkpointing_enable()
    model.train()
    inputs, targets = windows()
    answers = answers_of(model.objective, inputs, tied)
    loss, _ = model(inputs, targets, num_valid=(targets != -100).sum(), **answers)
    loss.backward()
    assert_same_gradients(gradients_of(model), plain_gradients("avatarl", tied))
