"""A plan's memory, floating-point operations and disk are those of a real run, within 15 %."""

from __future__ import annotations

import ctypes
import dataclasses
import multiprocessing
import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils import flop_counter

from avatarl.data import PreparedData
from avatarl.data.prepare import prepare
from avatarl.models import PlayerConfig, build_player
from avatarl.models.loading import last_hidden
from avatarl.models.players import model_from_config, player_shape
from avatarl.planning import count, plan
from avatarl.training import OptimConfig, TrainConfig, train
from avatarl.training.processes import Processes
from avatarl.training.setup import set_up

from ..conftest import TINY

MIB = 2**20
TOLERANCE = 0.15
VOCABULARY = 2000


@pytest.fixture(autouse=True)
def no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast this machine multiplies does not matter here."""
    monkeypatch.setattr("avatarl.planning.measure_flops", lambda *_: 1e11)


@pytest.fixture(scope="module")
def wide_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of words of random letters, which support a vocabulary of 2,000."""
    folder, rng = tmp_path_factory.mktemp("wide"), random.Random(1)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(1500)]
    for number in range(60):
        (folder / f"{number}.txt").write_text(" ".join(rng.choices(words, k=400)), encoding="utf-8")
    prepare([str(folder)], folder / "prepared", tokenizer=f"bpe:{VOCABULARY}", valid_fraction=0.2, quiet=True)
    assert PreparedData.open(folder / "prepared").vocab_size == VOCABULARY
    return folder / "prepared"


@pytest.fixture(scope="module")
def wide_critic(tmp_path_factory: pytest.TempPathFactory, wide_data: Path) -> Path:
    """A critic of a million parameters for it."""
    folder, tokenizer = tmp_path_factory.mktemp("critic"), PreparedData.open(wide_data).load_tokenizer()
    build_player(PlayerConfig("1m"), tokenizer, block_size=1024, seed=3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def wide_config(wide_data: Path, wide_critic: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """``wide_config(**overrides)``: two steps of a 5M player, whose tensors outweigh all else in the process."""

    def make(**overrides) -> TrainConfig:
        settings = dict(
            data=wide_data,
            out=tmp_path / "run",
            critic=wide_critic,
            player=PlayerConfig("5m"),
            block_size=256,
            micro_batch_size=8,
            steps=2,
            precision="fp32",
            device="cpu",
            eval_windows=1,
            tensorboard=False,
        )
        return TrainConfig(**{**settings, **overrides})

    return make


# --- memory ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def another_process() -> Iterator[ProcessPoolExecutor]:
    """A process to measure in. Its allocator gives buffers back at once: what is resident is what is in use."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**16))  # read when a process starts; smaller than a small weight
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            yield process


def measured_peak(config: TrainConfig) -> int:
    """Bytes that a training run adds to this process at its highest."""
    tiny = dataclasses.replace(config.player, settings={**config.player.settings, "num_hidden_layers": 1})
    # What a process loads and sets up once in its life is there after a tiny run.
    train(dataclasses.replace(config, out=f"{config.out}-tiny", player=tiny, micro_batch_size=1, steps=1), quiet=True)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = _resident("VmRSS")
    train(config, quiet=True)
    return _resident("VmHWM") - before


def _resident(entry: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(entry))


DROPOUT = {"settings": {"attention_dropout": 0.1}}  # whose attention keeps its scores
SHALLOW = {"num_hidden_layers": 3}  # quicker
MEMORY_CASES = {
    "avatarl": {"player": PlayerConfig("5m", settings=SHALLOW)},
}
SLOW_MEMORY_CASES = {
    "cross_entropy with muon": {"objective": "cross_entropy", "optim": OptimConfig(name="muon")},
    "gpt2": {"player": PlayerConfig("5m", architecture="gpt2")},
    "avatarl, six layers": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "ppo": {"objective": "ppo", "micro_batch_size": 4},
    "distillation": {"objective": "distillation", "micro_batch_size": 4},
    "reinforce": {"objective": "reinforce", "micro_batch_size": 4},
    "bf16": {"precision": "bf16", "micro_batch_size": 4},
    "qwen3 with long windows": {
        "player": PlayerConfig("5m", architecture="qwen3"),
        "block_size": 1024,
        "micro_batch_size": 2,
    },
    "few tokens, many weights": {"player": PlayerConfig("30m"), "micro_batch_size": 1},
    "few tokens, many weights, muon": {
        "player": PlayerConfig("30m"),
        "micro_batch_size": 1,
        "optim": OptimConfig(name="muon"),
        "objective": "cross_entropy",
    },
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "overrides",
    [
        *(pytest.param(case, id=name) for name, case in MEMORY_CASES.items()),
        *(pytest.param(case, id=name, marks=pytest.mark.slow) for name, case in SLOW_MEMORY_CASES.items()),
    ],
)
def test_memory_is_that_of_a_real_run(wide_config, another_process, overrides: dict):
    config = wide_config(**overrides)
    planned, measured = plan(config).total_memory, another_process.submit(measured_peak, config).result()
    print(f"planned {planned / MIB:.1f} MiB, measured {measured / MIB:.1f} MiB: {planned / measured - 1:+.1%}")
    assert measured > 150 * MIB  # else the noise of a process is no longer small beside it
    assert planned == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("player", [{}, {"architecture": "gpt2"}, {"architecture": "qwen3"}, DROPOUT], ids=str)
def test_what_autograd_keeps_is_that_of_real_tensors(wide_config, player: dict, precision: str):
    config = wide_config(player=PlayerConfig("1m", **player), precision=precision, block_size=48)
    shape = player_shape(config.player, VOCABULARY, config.block_size)
    model, found = model_from_config(shape).train(), count(shape, "player", config, VOCABULARY, precision)
    weights, kept = {weight.untyped_storage().data_ptr() for weight in model.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        last_hidden(model, torch.zeros(3, config.block_size, dtype=torch.int64))
    measured = sum(storage.nbytes() for address, storage in kept.items() if address not in weights)
    assert found.kept_once + 3 * found.kept == pytest.approx(measured, rel=1e-3)
    assert found.kept_once >= 2 * found.parameters.non_embedding * (precision == "bf16") * 0.99


# --- floating-point operations -------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "objective, models",
    [
        ("avatarl", {"player", "critic"}),
        ("cross_entropy", {"player"}),
        pytest.param("ppo", {"player", "critic", "snapshot"}, marks=pytest.mark.slow),
    ],
)
def test_flops_are_those_of_a_real_step(wide_config, objective: str, models: set[str], architecture: str):
    """PyTorch counts the products of a step as they are called, those inside the loss too.

    It is told of two kinds that it does not know: a product added in place, and a CPU's attention, which computes the
    half of the scores that a causal mask leaves.
    """
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    formulas = {  # of shapes
        torch.ops.aten.addmm_: lambda total, left, right, **_: 2 * left[0] * left[1] * right[1],
        attention: lambda *shapes, **_: flop_counter.sdpa_flop_count(*shapes[:3]) // 2,
        attention_backward: lambda *shapes, **_: flop_counter.sdpa_backward_flop_count(*shapes[:4]) // 2,
    }
    player = PlayerConfig("1m", architecture=architecture)
    config = wide_config(player=player, objective=objective, block_size=128, micro_batch_size=2, steps=1)
    setup = set_up(config, Processes())
    stage = setup.schedules.stage(1)
    batch = next(setup.batches.of_step(0, stage.objective.num_uniforms))
    with flop_counter.FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        answers = [critic.answers(batch) for critic in stage.critics]
        snapshot = setup.snapshot.answers(batch) if setup.snapshot else None
        loss, _ = setup.model(
            batch.inputs, batch.targets, answers, batch.targets.numel(), batch.uniforms, None, snapshot
        )
        loss.backward()
    planned = plan(config).flops
    print(f"planned {sum(planned.values()):.4g}, counted {counter.get_total_flops():.4g} FLOPs")
    assert sum(planned.values()) == pytest.approx(counter.get_total_flops(), rel=TOLERANCE)
    assert {model for model, amount in planned.items() if amount} == models


# --- disk ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_disk_is_that_of_a_real_run(tiny_config, tmp_path: Path, optimiser: str):
    wide = PlayerConfig(settings={**TINY, "hidden_size": 64, "intermediate_size": 256})  # or headers would be the most
    optim = OptimConfig(name=optimiser)
    config = tiny_config(tmp_path, objective="ppo", player=wide, optim=optim, keep_last=1, keep_every=4)
    planned = plan(config)
    train(config, quiet=True)
    checkpoints = list((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert planned.checkpoints == len(checkpoints)
    assert planned.checkpoint == pytest.approx(_tensor_files(checkpoints[0]), rel=TOLERANCE)
    assert planned.model_folder == pytest.approx(_tensor_files(tmp_path / "run" / "final"), rel=TOLERANCE)


def _tensor_files(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
