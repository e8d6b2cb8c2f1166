"""A whole optimiser step: AvataRL, cross-entropy with the same player, and what its parts cost.

    python benchmarks/step.py
    python benchmarks/step.py --player 124m --critic 30m --vocab 50257 --block_size 1024 --batch 16 --compile  # a GPU

benchmarks/README.md says what is measured, and how. The step is the trainer's: the same batches, precision, clipping
and optimisers, around random tokens and random weights.
"""

# ruff: noqa: E402 - torch waits for set_up_process()

from __future__ import annotations

from avatarl.process import set_up_process

set_up_process()

import argparse
import atexit
import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from timing import DEVICE, RESULTS, Ready, measure, record
from torch import Tensor
from transformers import PreTrainedModel

from avatarl.data.dataset import DTYPES, TokenStream, WindowOrder, Windows
from avatarl.device import pick_precision
from avatarl.files import File
from avatarl.models import (
    PRESETS,
    CriticCache,
    PlayerConfig,
    build_player,
    forward_flops_per_token,
    training_flops_per_token,
)
from avatarl.models.critic_cache import RecordFormat
from avatarl.models.critic_cache.answers import fill_part
from avatarl.models.critic_cache.parts import FREQUENCIES, parts_of
from avatarl.models.critics import CachedCritic, Critic, LiveCritic
from avatarl.models.loading import head_weight, last_hidden
from avatarl.objective import AvataRLConfig, linear_objective_loss, make_objective
from avatarl.objective.engine import IMPLEMENTATIONS
from avatarl.training.batches import Batch, uniforms_of
from avatarl.training.config import GuardConfig, OptimConfig
from avatarl.training.guard import Guard
from avatarl.training.model import PlayerWithLoss
from avatarl.training.optim import build_optimisers, clip_gradients
from avatarl.training.processes import Processes

AVATARL, CROSS_ENTROPY, FLOOR = "avatarl", "cross_entropy", "cross_entropy and critic's logits"
CACHED, SAMPLED, ALONE = "avatarl, cached critic", "avatarl, cached sample", "avatarl without a critic"
CACHED_BYTES = 134  # of a position: 32 most likely tokens, or 64 drawn ones
OF_LOGITS = "F.cross_entropy of logits"
PART, MATMUL = "part: ", "large product"
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
NUM_WINDOWS = 256


@dataclass(frozen=True)
class Case:
    """What is trained, on what, how."""

    player: str
    critic: str
    vocabulary: int
    block_size: int
    micro_batch_size: int
    optimiser: str
    dtype: str
    compile: bool
    impl: str
    device: str


class Vocabulary:
    """As much of a tokenizer as building a model takes."""

    bos_token_id = eos_token_id = pad_token_id = 0

    def __init__(self, size: int):
        self._size = size

    def __len__(self) -> int:
        return self._size


class Training:
    """Models, optimisers and data of a case, shared by everything that is timed: no one's weights matter."""

    def __init__(self, case: Case):
        self.case = case
        is_bf16 = case.dtype == "bfloat16"
        self._autocast = torch.autocast(case.device, torch.bfloat16) if is_bf16 else nullcontext()
        self.compiled: Callable = torch.compile if case.compile else lambda module: module
        self.impl = "compiled" if case.impl == "auto" and case.compile else case.impl
        vocabulary = Vocabulary(case.vocabulary)
        self.player = (
            build_player(PlayerConfig(case.player), vocabulary, case.block_size, seed=1).to(case.device).train()
        )
        critic = build_player(PlayerConfig(case.critic), vocabulary, case.block_size, seed=2)
        self.critic = critic.to(case.device, torch.bfloat16 if is_bf16 else None).eval().requires_grad_(False)
        self.optimisers = build_optimisers(self.player, OptimConfig(case.optimiser), total_steps=10**6)
        self.guard = Guard(GuardConfig(), torch.device(case.device))
        self._windows, self._order = random_windows(case), WindowOrder(NUM_WINDOWS, seed=1)
        self._position = 0

    def batch(self) -> Batch:
        """Inputs and targets (B, T), each time others."""
        indices = self._order.indices(self._position, self.case.micro_batch_size)
        self._position += self.case.micro_batch_size
        uniforms = uniforms_of(1, indices, self.case.block_size, samples=1)  # for a sampled tail
        batch = Batch(*self._windows.batch(indices), uniforms, "train", indices)
        return batch.to(torch.device(self.case.device))

    @functools.cache  # noqa: B019 - there is one training at a time
    def cache(self, kind: str) -> CachedCritic:
        """The critic's answers on disk, as ``avatarl critic cache`` writes them."""
        return CachedCritic("cache", random_cache(self.case, kind, self.critic, self._windows))

    def update(self) -> None:
        """What follows the backward pass, as in training."""
        norm = clip_gradients(self.player.parameters(), 1.0, Processes())
        skipped = self.guard.check(1, norm, norm)  # the values do not matter here
        self.optimisers.step(1, skipped)

    def model(
        self, objective: str, critic: Critic | None = None, settings: AvataRLConfig | None = None
    ) -> Callable[[Batch], Tensor]:
        """A batch in, loss out, as in training."""
        model = PlayerWithLoss(
            self.player, make_objective(objective, settings), self.case.vocabulary, self.impl == "compiled"
        )
        model, num_valid = self.compiled(model), self.case.block_size * self.case.micro_batch_size
        if critic and self.case.compile:
            critic.compile()

        def loss(batch: Batch) -> Tensor:
            answers = [critic.answers(batch)] if critic else []
            return model(batch.inputs, batch.targets, answers, num_valid, batch.uniforms)[0]

        return loss

    def step(self, model: Callable[[Batch], Tensor], beside: Callable[[Tensor], object] | None = None):
        """A function that does one optimiser step, and something else with its inputs."""

        def run() -> None:
            batch = self.batch()
            with self._autocast:
                loss = model(batch)
            loss.backward()
            self.update()
            if beside is not None:
                with torch.no_grad(), self._autocast:
                    beside(batch.inputs)

        return run

    # --- whole steps -----------------------------------------------------------------------------------------------

    def avatarl(self) -> Callable[[], object]:
        return self.step(self.model("avatarl", LiveCritic("critic", self.critic)))

    def avatarl_cached(self) -> Callable[[], object]:
        return self.step(self.model("avatarl", self.cache("top")))

    def avatarl_sampled(self) -> Callable[[], object]:
        settings = AvataRLConfig(pool="arithmetic", threshold="none", tail="sample")
        return self.step(self.model("avatarl", self.cache("sample"), settings))

    def avatarl_alone(self) -> Callable[[], object]:
        return self.step(self.model("avatarl", settings=AvataRLConfig(critic_weight=0.0, reality_weight=1.0)))

    def cross_entropy(self) -> Callable[[], object]:
        return self.step(self.model("cross_entropy"))

    def cross_entropy_and_critic(self) -> Callable[[], object]:
        critic = self.compiled(lambda inputs: self.critic(inputs, use_cache=False).logits)
        return self.step(self.model("cross_entropy"), critic)

    def cross_entropy_of_logits(self) -> Callable[[], object]:
        def loss(inputs: Tensor, targets: Tensor) -> Tensor:
            logits = self.player(inputs, use_cache=False).logits
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

        loss = self.compiled(loss)
        return self.step(lambda batch: loss(batch.inputs, batch.targets))

    # --- parts of AvataRL's step -------------------------------------------------------------------------------------

    def player_part(self) -> Callable[[], object]:
        inputs = self.batch().inputs
        hidden_states = self.compiled(lambda inputs: last_hidden(self.player, inputs))
        gradient = torch.randn(*inputs.shape, self.player.config.hidden_size, device=inputs.device)

        def run() -> None:
            with self._autocast:
                hidden = hidden_states(inputs)
            hidden.backward(gradient.to(hidden.dtype))
            self.player.zero_grad(set_to_none=True)

        return run

    def critic_part(self) -> Callable[[], object]:
        inputs = self.batch().inputs
        hidden_states = self.compiled(lambda inputs: last_hidden(self.critic, inputs))

        def run() -> None:
            with torch.no_grad(), self._autocast:
                hidden_states(inputs)

        return run

    def loss_part(self) -> Callable[[], object]:
        inputs, targets, *_ = self.batch()
        with torch.no_grad(), self._autocast:
            hidden, critic_hidden = last_hidden(self.player, inputs), last_hidden(self.critic, inputs)
        hidden.requires_grad_()
        heads = head_weight(self.player), head_weight(self.critic)
        objective = make_objective("avatarl")

        def run() -> None:
            with self._autocast:
                loss, _ = linear_objective_loss(
                    objective, hidden, heads[0], critic_hidden, heads[1], targets, impl=self.impl
                )
            torch.autograd.grad(loss, (hidden, heads[0]))

        return run

    def optimiser_part(self) -> Callable[[], object]:
        gradients = [torch.randn_like(parameter) for parameter in self.player.parameters()]

        def run() -> None:
            for parameter, gradient in zip(self.player.parameters(), gradients, strict=True):
                parameter.grad = gradient
            self.update()

        return run

    def large_product(self) -> Callable[[], object]:
        size = MATMUL_SIZE[self.case.device]
        factor = torch.randn(size, size, device=self.case.device).to(getattr(torch, self.case.dtype))
        return lambda: factor @ factor


WHOLE = {
    AVATARL: Training.avatarl,
    CACHED: Training.avatarl_cached,
    SAMPLED: Training.avatarl_sampled,
    ALONE: Training.avatarl_alone,
    CROSS_ENTROPY: Training.cross_entropy,
    FLOOR: Training.cross_entropy_and_critic,
    OF_LOGITS: Training.cross_entropy_of_logits,
}
PARTS = {
    PART + "data": lambda training: training.batch,
    PART + "player": Training.player_part,
    PART + "critic": Training.critic_part,
    PART + "loss": Training.loss_part,
    PART + "optimiser": Training.optimiser_part,
}
EVERYTHING = {**WHOLE, **PARTS, MATMUL: Training.large_product}

make_training = functools.lru_cache(maxsize=1)(Training)


def build(name: str, case: Case) -> Ready:
    """Something of a training step, ready to run; its first run makes the optimiser's state."""
    call = EVERYTHING[name](make_training(case))
    return Ready(call, warm_up=call)


def random_windows(case: Case) -> Windows:
    """Random tokens, on disk as prepared ones are."""
    tokens = np.random.default_rng(0).integers(case.vocabulary, size=NUM_WINDOWS * case.block_size + 1)
    with tempfile.NamedTemporaryFile(delete=False) as file:
        file.write(tokens.astype(DTYPES["uint32"]).tobytes())
    atexit.register(Path(file.name).unlink)
    return Windows(TokenStream([Path(file.name)], DTYPES["uint32"]), case.block_size)


def random_cache(case: Case, kind: str, critic: PreTrainedModel, windows: Windows) -> CriticCache:
    """What a critic says of ``windows``, in a folder that goes with the process."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    record = RecordFormat.within(kind, CACHED_BYTES, 0, case.vocabulary)
    manifest = {
        "block_size": case.block_size,
        "bytes_per_token": record.dtype.itemsize,
        "windows": {"train": len(windows)},
        **dataclasses.asdict(record),
    }
    precision = "bf16" if case.dtype == "bfloat16" else "fp32"
    np.full(case.vocabulary, -np.log(case.vocabulary), "<f4").tofile(folder / FREQUENCIES)
    parts = list(parts_of(manifest))
    for part in parts:
        fill_part(folder, part, windows, critic, record, 1, case.micro_batch_size, precision, lambda _: None)
    files = {name: File(folder / name) for name in (FREQUENCIES, *(part.name for part in parts))}
    return CriticCache(folder, manifest, "", SimpleNamespace(train=windows.stream, valid=windows.stream), files)


def operations(name: str, case: Case) -> tuple[float | None, float | None]:
    """Floating-point operations of what has a count, in units of 10⁹: all, and those of the critic among them."""
    if name == MATMUL:
        return 2 * MATMUL_SIZE[case.device] ** 3 / 1e9, 0.0
    if name not in WHOLE:
        return None, None
    training, gigatokens = make_training(case), case.block_size * case.micro_batch_size / 1e9
    player = gigatokens * training_flops_per_token(training.player, case.block_size)
    uses_critic = name in (AVATARL, FLOOR)
    critic = gigatokens * forward_flops_per_token(training.critic, case.block_size) if uses_critic else 0.0
    return player + critic, critic


def main(arguments: Sequence[str] | None = None) -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--player", default="5m", choices=PRESETS)
    parser.add_argument("--critic", default="1m", choices=PRESETS)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--block_size", type=int, default=256, help="tokens in a window")
    parser.add_argument("--batch", type=int, default=8, help="windows in a step")
    parser.add_argument("--optimiser", default="adamw", choices=("adamw", "muon"))
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="as the trainer's")
    parser.add_argument("--compile", action="store_true", help="torch.compile of models and loss, as the trainer's")
    parser.add_argument("--impl", default="auto", choices=IMPLEMENTATIONS, help="what computes the loss")
    parser.add_argument("--seconds", type=float, default=180, help="about how long it takes")
    parser.add_argument("--device", default=DEVICE, choices=("cpu", "cuda"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV file")
    asked = parser.parse_args(arguments)

    precision = pick_precision(asked.precision, torch.device(asked.device))
    case = Case(
        asked.player,
        asked.critic,
        asked.vocab,
        asked.block_size,
        asked.batch,
        asked.optimiser,
        "bfloat16" if precision == "bf16" else "float32",
        asked.compile,
        asked.impl,
        asked.device,
    )
    for _, measured in measure(build, list(EVERYTHING), [case], asked.device, asked.seconds, memory_of=WHOLE):
        record(
            asked.results / "step.csv",
            case,
            measured,
            gflop=lambda name: operations(name, case)[0],
            critic_gflop=lambda name: operations(name, case)[1],
        )


if __name__ == "__main__":
    main()
