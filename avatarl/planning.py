"""Say what a run will take before it starts: FLOPs, memory, time and disk.

Formulas over what is counted on the models themselves: parameters, FLOPs of a token, bytes that autograd keeps of a
window. tests/planning compares them with real runs.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from avatarl.errors import UserError, nearest_name
from avatarl.models import PRESETS, PlayerConfig
from avatarl.objective.config import require_number, require_whole
from avatarl.training.config import TrainConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from avatarl.models import ParameterCount

# The share of a device's peak FLOP/s that a run reaches. Small models on large GPUs stay below it, large compiled ones
# exceed it; the first lines of a run tell.
UTILISATION = 0.3
GPT2_VOCABULARY = 50_257
GIB = 2**30
# What a process holds beside its tensors, roughly: Python with its libraries; on a GPU the context, workspaces and
# memory that the allocator cannot use.
OUTSIDE_TENSORS = {"cpu": GIB // 2, "cuda": GIB}
# Float32 copies of a chunk's logits that the loss works with, its gradient among them: 2 to 4, by objective.
LOSS_COPIES = 3
DIVIDED = ("weights", "optimiser state", "snapshot")  # the parts that FSDP2 divides, and a checkpoint holds
# GiB as PyTorch reports them, a little under the name's gigabytes; dense TFLOP/s in bf16 and fp32 from NVIDIA's data
# sheets and, for GeForce cards, the whitepapers of GA102 and AD102 (bf16 summed in fp32). Float32 products do not use
# TF32 unless asked to, and these runs do not ask. H100 and H200 are the SXM ones.
GPUS = {
    "H200": (139.8, 989, 67),
    "H100": (79.1, 989, 67),
    "H100-PCIe": (79.1, 756, 51),
    "A100-80": (79.1, 312, 19.5),
    "A100-40": (39.4, 312, 19.5),
    "L40S": (44.4, 362, 91.6),
    "A10": (22.0, 125, 31.2),
    "L4": (22.0, 121, 30.3),
    "RTX-4090": (23.5, 165.2, 82.6),
    "RTX-3090": (23.6, 71, 35.6),
    "T4": (14.6, None, 8.1),  # multiplies bf16 by emulation only
}


class Hardware(NamedTuple):
    """One device."""

    name: str
    kind: str  # cpu or cuda
    memory: int  # bytes that a process may use
    flops: dict[str, float]  # FLOP/s of large matrix products by precision: bf16 where it is native, fp32
    source: str  # of these FLOP/s


class Sizes(NamedTuple):
    """What a model holds and costs."""

    parameters: ParameterCount
    weights: int  # bytes of parameters and buffers
    matrices: int  # bytes of those that Muon updates
    head: int  # bytes of the head
    flops: int  # of one forward pass, per token
    kept: int  # bytes of one window that autograd keeps for the backward pass
    kept_once: int  # bytes that it keeps of any number of windows: weights cast to bfloat16
    layers: int
    gathered: int  # bytes of the weights that FSDP2 holds whole at once: the root's, a layer's and the next one's


@dataclass(frozen=True)
class Plan:
    """What a run takes. Bytes of memory are those of one process."""

    config: TrainConfig
    processes: int
    windows: int  # in a process's largest forward pass
    micro_batches: int  # forward passes of a process in an optimiser step
    utilisation: float  # the assumed share of the peak FLOP/s
    hardware: Hardware  # of each process
    precision: str  # bf16 or fp32
    vocab_size: int
    steps: int  # optimiser steps
    player: Sizes
    critics: tuple[tuple[Sizes, int], ...]  # live ones, and the optimiser steps in which each of them answers
    averages: int  # how many of the critics are averages of the player
    cache_bytes: int  # read from cached critics, per token
    has_snapshot: bool  # whether an earlier player is kept, as ppo does
    warnings: tuple[str, ...]  # what is assumed or not counted, a line each

    @property
    def parameters(self) -> ParameterCount:
        """The player's."""
        return self.player.parameters

    @property
    def tokens(self) -> int:
        """Training tokens of the whole run."""
        return self.steps * self.config.windows_per_step * self.config.block_size

    @property
    def flops(self) -> dict[str, int]:
        """FLOPs of the whole run by model. A backward pass costs two forward passes; critics and snapshot have none."""
        step_tokens = self.tokens // self.steps
        flops = {
            "player": 3 * self.tokens * self.player.flops,
            "critic": sum(steps * step_tokens * critic.flops for critic, steps in self.critics),
        }
        return flops | ({"snapshot": self.tokens * self.player.flops} if self.has_snapshot else {})

    @property
    def critic_share(self) -> float:
        """The critics' part of all FLOPs."""
        return self.flops["critic"] / sum(self.flops.values())

    @property
    def tokens_per_second(self) -> float:
        """Of all processes, at the assumed utilisation. Processes on a CPU share its speed."""
        devices = 1 if self.hardware.kind == "cpu" else self.processes
        rate = devices * self.hardware.flops[self.precision] * self.utilisation
        return rate * self.tokens / sum(self.flops.values())

    @property
    def hours(self) -> float:
        """Of training alone, without evaluation, compilation and checkpoints."""
        return self.tokens / self.tokens_per_second / 3600

    @property
    def optimiser_state(self) -> int:
        """Bytes that the optimisers keep between steps: AdamW two numbers for a weight, Muon one for a matrix."""
        return 2 * self.player.weights - (self.player.matrices if self.config.optim.name == "muon" else 0)

    @property
    def checkpoint(self) -> int:
        """Bytes of one checkpoint."""
        return self.player.weights * (1 + self.averages + self.has_snapshot) + self.optimiser_state

    @property
    def checkpoints(self) -> int:
        """How many of them lie on the disk at the end."""
        every, last, also = self.config.checkpoint_every_steps, self.config.keep_last, self.config.keep_every
        written = {*range(every, self.steps + 1, every), self.steps}
        return len({*sorted(written)[-last:]} | {step for step in written if also and step % also == 0})

    @property
    def model_folder(self) -> int:
        """Bytes of the finished player."""
        return self.player.weights

    @cached_property
    def phases(self) -> dict[str, dict[str, int]]:
        """Bytes of tensors by part, at the highest of each phase of an optimiser step."""
        import torch

        from avatarl.objective.engine import chunk_rows

        player, critics = self.player, [critic for critic, _ in self.critics]
        models = [player, *critics, *([player] if self.has_snapshot else [])]
        tokens, width = self.windows * self.config.block_size, 2 if self.precision == "bf16" else 4
        logits = chunk_rows(tokens, self.vocab_size, torch.device(self.hardware.kind)) * self.vocab_size
        activations = player.kept_once + self.windows * player.kept
        # Without gradients a layer holds about half of what autograd would keep of it.
        frozen = max((self.windows * model.kept // model.layers // 2 for model in models[1:]), default=0)
        held = {
            "weights": player.weights,
            "gradients": player.weights if self.micro_batches > 1 else 0,
            "optimiser state": self.optimiser_state,
            "critics": sum(critic.weights for critic in critics),
            "snapshot": player.weights if self.has_snapshot else 0,
        }
        batch = held | {"player's activations": activations, "cached answers": tokens * self.cache_bytes}
        late = held | {"gradients": player.weights}
        phases = {
            "forward": batch | {"critics' activations": frozen},
            # The head's gradient, every model's logits of a chunk, and what the loss works with.
            "loss": batch | {"loss": player.head + logits * (width * len(models) + 4 * LOSS_COPIES)},
            # At the end, when all gradients are there; the embedding's is about to be added to the head's.
            "backward": late | {"player's activations": activations // player.layers, "temporaries": 2 * player.head},
            # Muon copies weights and momenta in case the update is taken back.
            "optimiser": late | {"temporaries": 2 * player.matrices if self.config.optim.name == "muon" else 0},
        }
        return {phase: self._shared(parts) for phase, parts in phases.items()}

    def _shared(self, parts: dict[str, int]) -> dict[str, int]:
        """What each of several processes holds, where one alone would hold ``parts``."""
        if self.processes == 1:
            return parts
        if self.config.parallel == "ddp":
            return parts | {"gradients": self.player.weights}  # they lie in the buckets that are exchanged, which stay
        parts = parts | {name: math.ceil(parts[name] / self.processes) for name in DIVIDED}
        if self.micro_batches == 1:  # else whole gradients are added up, and exchanged after the last micro-batch
            layers = min(parts["gradients"], self.player.gathered)
            parts["gradients"] = math.ceil(parts["gradients"] / self.processes) + layers
        parts["gathered layers"] = self.player.gathered * (1 + self.has_snapshot)
        if self.config.shard_critics:
            parts["critics"] = math.ceil(parts["critics"] / self.processes)
            parts["gathered layers"] += sum(critic.gathered for critic, _ in self.critics)
        return parts

    @property
    def moment(self) -> str:
        """The phase of an optimiser step in which a process holds most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of a process's tensors by part, when it holds most."""
        parts = self.phases[self.moment]
        if not (self.config.checkpoint_in_background and self.hardware.kind == "cpu"):
            return parts
        return parts | {"checkpoint's copy": sum(parts[name] for name in DIVIDED)}

    @property
    def total_memory(self) -> int:
        """Bytes of all of them."""
        return sum(self.memory.values())

    @property
    def needed_memory(self) -> int:
        """Bytes on a device: tensors and what lies beside them, of one process, or of all that share a CPU."""
        one = self.total_memory + OUTSIDE_TENSORS[self.hardware.kind]
        return one * self.processes if self.hardware.kind == "cpu" else one

    @property
    def fits(self) -> bool:
        """Whether the device's memory is large enough."""
        return self.needed_memory <= self.hardware.memory


def plan(
    config: TrainConfig,
    processes: int = 1,
    utilisation: float = UTILISATION,
    vocab_size: int | None = None,
    critic_preset: str | None = None,
    recipe: str | Path | None = None,
) -> Plan:
    """Say what ``config`` takes on ``config.device``, which may also be a GPU's name, such as ``H100``.

    Nothing is trained and nothing is downloaded. Neither data nor critics need to exist: ``Plan.warnings`` says what is
    assumed instead.

    Args:
        config: The run.
        processes: How many processes share the run, a device each.
        utilisation: The share of the device's peak FLOP/s to assume.
        vocab_size: Tokens of the vocabulary if the data does not exist yet (default: GPT-2's 50,257).
        critic_preset: The size of critics that do not exist yet, one of a player's presets.
        recipe: The recipe's file. A critic that does not exist yet may be the output of another recipe beside it.

    Raises:
        UserError: A setting cannot be used, the device is unknown or lacks the precision, a model cannot be counted, or
            ``epochs`` is given and the data does not exist.
    """
    from avatarl.models.players import player_shape
    from avatarl.objective import make_objective
    from avatarl.training.schedule import Schedules

    require_whole("processes", processes, minimum=1)
    require_number("utilisation", utilisation, lambda x: 0 < x <= 1, "a number above 0 and at most 1")
    if vocab_size is not None:
        require_whole("vocab_size", vocab_size, minimum=1)
    if critic_preset is not None and critic_preset not in PRESETS:
        raise UserError(f"critic_preset is {critic_preset!r}; expected one of {', '.join(PRESETS)}")
    windows, micro_batches = share_of_step(config, processes)
    warnings: list[str] = []
    vocab_size, steps = _vocabulary_and_steps(config, vocab_size, warnings)
    hardware = find_hardware(config.device, config.precision)
    precision = config.precision if config.precision != "auto" else "bf16" if "bf16" in hardware.flops else "fp32"
    if precision not in hardware.flops:
        raise UserError(f"precision is {precision!r}, which {hardware.name} has not natively; expected fp32 or auto")

    objective = make_objective(config.objective, config.avatarl, config.baseline)
    found = [_find_critic(name, config, vocab_size) for name in (config.critics if objective.needs_critic else ())]
    for number, critic in enumerate(found):
        if critic.absence:
            found[number] = _assume(critic, config, vocab_size, critic_preset, recipe, warnings)
    try:
        objective.check_settings(vocab_size, [critic.limits for critic in found])
        schedules = Schedules(config.schedules, objective, found, steps)
    except ValueError as error:
        raise UserError(str(error)) from error
    about = f"player.architecture {config.player.architecture!r} with player.settings {config.player.settings}"
    player = count(player_shape(config.player, vocab_size, config.block_size), about, config, vocab_size, precision)
    live = [critic for critic in found if critic.shape is not None]
    critics = [
        count(each.shape, f"critic {each.name}", config, vocab_size, precision, each.is_average) for each in live
    ]
    return Plan(
        config,
        processes,
        windows,
        micro_batches,
        utilisation,
        hardware,
        precision,
        vocab_size,
        steps,
        player,
        critics=tuple(zip(critics, map(schedules.active_steps, live), strict=True)),
        averages=sum(critic.is_average for critic in found),
        cache_bytes=sum(12 * (1 + top) + 8 * draws + 8 for top, draws in filter(None, (c.limits for c in found))),
        has_snapshot=objective.needs_snapshot,
        warnings=tuple(warnings),
    )


def share_of_step(config: TrainConfig, processes: int) -> tuple[int, int]:
    """Windows in a process's largest forward pass, and its forward passes in an optimiser step.

    Raises:
        UserError: The processes cannot share a step's windows evenly.
    """
    share = config.windows_per_process(processes)
    passes = math.ceil(share / config.micro_batch_size)
    return math.ceil(share / passes), passes


def count(
    shape: PreTrainedConfig, about: str, config: TrainConfig, vocab_size: int, precision: str, is_trained: bool = True
) -> Sizes:
    """Count the sizes of a model of that configuration on one whose tensors have no contents.

    A model that is not trained, nor an average of one that is, has its weights in the run's precision.

    Raises:
        UserError: The model cannot be built, is too small, or does something that depends on numbers not known yet.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from avatarl.models import count_parameters, forward_flops_per_token
    from avatarl.models.players import check_size, model_from_config
    from avatarl.training.optim import split_parameters
    from avatarl.untrusted import refusing

    dtype = torch.bfloat16 if precision == "bf16" and not is_trained else torch.float32
    fake_tensors = logging.getLogger("torch._subclasses.fake_tensor")
    fake_tensors.disabled = True  # the error below says in one line what it would log in thirty
    try:
        with refusing(f"{about} cannot be planned without computing: "), FakeTensorMode():
            model = model_from_config(shape, dtype).train()
            check_size(model, vocab_size, config.block_size)
            flops = forward_flops_per_token(model, config.block_size)
            one, two = (_kept_bytes(model, windows, config.block_size, precision) for windows in (1, 2))
    finally:
        fake_tensors.disabled = False

    def size(module: torch.nn.Module) -> int:
        return sum({id(x): x.nbytes for x in (*module.parameters(), *module.buffers())}.values())

    layers = sorted(
        size(module) for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())
    )
    return Sizes(
        parameters=count_parameters(model),
        weights=size(model),
        matrices=sum(matrix.nbytes for matrix in split_parameters(model)[0] if matrix.dim() == 2),
        head=model.get_output_embeddings().weight.nbytes,
        flops=flops,
        kept=two - one,
        kept_once=2 * one - two,
        layers=shape.get_text_config().num_hidden_layers,
        gathered=size(model) - sum(layers[:-2]),
    )


def _kept_bytes(model: PreTrainedModel, windows: int, block_size: int, precision: str) -> int:
    """Bytes that autograd keeps of a forward pass for the backward pass, beside the weights themselves."""
    import torch

    from avatarl.models.loading import last_hidden

    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        # A causal mask is made for fake tensors alone: attention over real ones only has to know that it is causal.
        if tensor.dim() != 4 or tensor.shape[1:] != (1, block_size, block_size):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    # Fake CUDA tensors need a real device, so autocast follows a CPU's rules; a GPU keeps some more in float32.
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        last_hidden(model, torch.zeros(windows, block_size, dtype=torch.int64))
    return sum(storage.nbytes() for key, storage in kept.items() if key not in weights)


def _vocabulary_and_steps(config: TrainConfig, vocab_size: int | None, warnings: list[str]) -> tuple[int, int]:
    """Tokens of the vocabulary and optimiser steps, from the data where it exists."""
    from avatarl.data.dataset import MANIFEST, read_manifest

    if (Path(config.data) / MANIFEST).exists():
        manifest = read_manifest(Path(config.data))[1]
        if vocab_size not in (None, manifest["vocab_size"]):
            raise UserError(
                f"vocab_size is {vocab_size}, but {config.data} has {manifest['vocab_size']}; leave vocab_size out"
            )
        windows = (manifest["tokens"]["train"] - 1) // config.block_size
        return manifest["vocab_size"], config.total_steps(min(windows, config.train_windows or windows))
    if config.steps is None:
        raise UserError(
            f"epochs is {config.epochs}, and {config.data} does not exist; expected steps, or data made by "
            f"`avatarl prepare`"
        )
    if vocab_size is None:
        warnings.append(
            f"{config.data} does not exist: assuming {GPT2_VOCABULARY:,} tokens of vocabulary (--vocab_size)"
        )
    return vocab_size or GPT2_VOCABULARY, config.steps


class _Critic(NamedTuple):
    """What is known of a critic that is not opened."""

    name: str
    shape: PreTrainedConfig | None = None  # None of a cache, and where nothing is known
    limits: tuple[int, int] | None = None  # numbers of most likely and of drawn tokens in a cache
    start_step: int = 0  # the last step without its answers
    is_average: bool = False  # of the player
    absence: str = ""  # why it cannot be looked at


def _find_critic(name: str, config: TrainConfig, vocab_size: int) -> _Critic:
    """What a critic's name, and the files that it may stand for, tell."""
    from transformers import AutoConfig

    from avatarl.models.critic_cache.read import read_manifest
    from avatarl.models.critics import critic_class, parse_ema_critic, parse_random_critic
    from avatarl.models.loading import one_line, resolve_model
    from avatarl.models.players import player_shape

    match critic_class(name).kind:
        case "cache":
            manifest = read_manifest(Path(name))[1]
            if manifest["vocab_size"] != vocab_size:
                raise UserError(f"critic {name} is a cache of {manifest['vocab_size']} tokens; expected {vocab_size}")
            return _Critic(name, limits=(manifest["num_top"], manifest["num_draws"]))
        case "average":
            shape = player_shape(config.player, vocab_size, config.block_size)
            return _Critic(name, shape, start_step=parse_ema_critic(name)[1], is_average=True)
        case "random":
            preset, _ = parse_random_critic(name)
            return _Critic(name, player_shape(PlayerConfig(preset), vocab_size, config.block_size))
    try:
        # A name without a folder may be a hub id: only what was downloaded before is looked at.
        shape = AutoConfig.from_pretrained(resolve_model(name), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:  # a UserError too
        return _Critic(name, absence=f"cannot be used ({one_line(error)})" if Path(name).exists() else "is not here")
    if (rows := shape.get_text_config().vocab_size) < vocab_size:
        raise UserError(f"critic {name} has {rows} output rows for {vocab_size} tokens")
    return _Critic(name, shape)


def _assume(
    critic: _Critic, config: TrainConfig, vocab_size: int, preset: str | None, recipe: str | None, warnings: list[str]
) -> _Critic:
    """A critic that does not exist, of the size of ``preset``, else of the player in the recipe that makes it."""
    from avatarl.models.players import player_shape

    if preset is not None:
        player, source = PlayerConfig(preset), f"a player of preset {preset}"
    elif (made := _player_of_recipe_making(critic.name, recipe)) is not None:
        player, source = made[1], f"what {made[0]} makes"
    else:
        warnings.append(
            f"critic {critic.name} {critic.absence}: its FLOPs, weights and activations ARE NOT COUNTED; give its size "
            f"by --critic_preset {'|'.join(PRESETS)}"
        )
        return critic
    warnings.append(f"critic {critic.name} {critic.absence}: assuming {source}")
    return critic._replace(shape=player_shape(player, vocab_size, config.block_size))


def _player_of_recipe_making(run: str, recipe: str | Path | None) -> tuple[Path, PlayerConfig] | None:
    """The recipe beside ``recipe`` whose output is ``run``, and the player it trains."""
    from avatarl.untrusted import read_yaml

    for path in sorted(Path(recipe).parent.glob("*.yaml")) if recipe else ():
        try:
            settings = read_yaml(path)
            if settings["out"] == run:
                return path, PlayerConfig(**settings.get("player", {}))
        except (OSError, ValueError, TypeError, KeyError):  # not a recipe of ours
            continue
    return None


def find_hardware(name: str, precision: str = "auto") -> Hardware:
    """The GPU of that name in the table, or what is at hand under ``auto``, ``cpu`` or ``cuda``, measured in a second.

    Raises:
        UserError: There is no such device.
    """
    for gpu, (gib, bf16, fp32) in GPUS.items():
        if gpu.lower() == name.lower():
            flops = ({"bf16": 1e12 * bf16} if bf16 else {}) | {"fp32": 1e12 * fp32}
            return Hardware(gpu, "cuda", int(gib * GIB), flops, "NVIDIA's data sheet")
    if name.partition(":")[0] not in ("auto", "cpu", "cuda"):
        known = ("auto", "cpu", "cuda", *GPUS)
        raise UserError(f"device is {name!r}; expected one of {', '.join(known)}{nearest_name(name, known)}")
    import torch

    from avatarl.device import pick_device, pick_precision

    device = pick_device(name)
    taken = pick_precision(precision, device)
    is_gpu = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if is_gpu else available_memory()
    return Hardware(
        str(device), device.type, memory, {taken: measure_flops(device, taken)}, "a large product, timed now"
    )


def available_memory() -> int:
    """Bytes of this machine's memory that a new process could have; all of it where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def measure_flops(device: torch.device, precision: str, seconds: float = 1.0) -> float:
    """FLOP/s of a large matrix product: the median of those that fit in ``seconds``."""
    import torch
    from torch.utils.benchmark import Timer

    width = 8192 if device.type == "cuda" else 1024
    matrix = torch.ones(width, width, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    timer = Timer("matrix @ matrix", globals={"matrix": matrix}, num_threads=torch.get_num_threads())
    return 2 * width**3 / timer.blocked_autorange(min_run_time=seconds).median


def plan_table(plan: Plan) -> str:
    """The plan in some twenty lines."""
    is_cpu, hardware = plan.hardware.kind == "cpu", plan.hardware
    several = f"{plan.processes} × " if plan.processes > 1 else ""
    peak = f"{'' if is_cpu else several}{hardware.flops[plan.precision] / 1e12:,.3g} TFLOP/s ({hardware.source})"
    flops = " + ".join(f"{amount:.2e} {model}" for model, amount in plan.flops.items() if amount)
    if plan.flops["critic"]:
        flops += f" = {sum(plan.flops.values()):.2e}, {plan.critic_share:.0%} of them the critic's"
    kept = f", {plan.checkpoints} kept: {_bytes(plan.checkpoints * plan.checkpoint)}" if plan.checkpoints > 1 else ""
    rows = [(part, amount) for part, amount in plan.memory.items() if amount >= 2**16]  # 0.1 MiB
    rows += [("all tensors", plan.total_memory), ("beside them, about", OUTSIDE_TENSORS[hardware.kind])]
    whose = f"{plan.processes} processes" if is_cpu and plan.processes > 1 else "one process"
    verdict = "fits in" if plan.fits else "! DOES NOT FIT in"
    parallel = f", {plan.config.parallel}" if several else ""
    lines = [
        f"{plan.config.objective} on {several}{hardware.name}, {plan.precision}{parallel}",
        "",
        f"  parameters   {plan.parameters.total:,} ({plan.parameters.non_embedding:,} outside the embedding)",
        f"  tokens       {plan.tokens:,} in {plan.steps:,} steps of {plan.tokens // plan.steps:,}",
        f"  FLOPs        {flops}",
        f"  speed        {plan.tokens_per_second:,.0f} tokens per second, assuming {plan.utilisation:.0%} of {peak}",
        f"  time         {_duration(plan.hours)} of training",
        f"  checkpoint   {_bytes(plan.checkpoint)}{kept}",
        f"  model        {_bytes(plan.model_folder)}, the finished folder",
        "",
        f"  memory of one process, with {plan.windows} windows at a time; highest in the {plan.moment} phase",
        *(f"    {part:<22}{_bytes(amount):>12}" for part, amount in rows),
        f"  {_bytes(plan.needed_memory)} for {whose} {verdict} {_bytes(hardware.memory)}",
        *(f"  ! {warning}" for warning in plan.warnings),
    ]
    return "\n".join(lines)


def _bytes(amount: int) -> str:
    """In MiB, or GiB from 1 GiB on."""
    return f"{amount / GIB:,.2f} GiB" if amount >= GIB else f"{amount / 2**20:,.1f} MiB"


def _duration(hours: float) -> str:
    """In the unit that suits."""
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} seconds"
    return f"{60 * hours:.1f} minutes" if hours < 2 else f"{hours:,.1f} hours"
