"""What a run will take, before it is started: parameters, FLOPs, memory, time and disk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import yaml
from transformers import AutoConfig, PreTrainedConfig

from avatarl.data.dataset import MANIFEST, _read_manifest
from avatarl.errors import UserError
from avatarl.models import PRESETS, ParameterCount, PlayerConfig
from avatarl.models.critics import RANDOM_CRITIC
from avatarl.models.loading import resolve_model
from avatarl.models.players import player_shape
from avatarl.objective import make_objective
from avatarl.objective.config import require_number, require_whole

from .assembly import largest_divisor
from .config import TrainConfig
from .dry_run import DryRun, dry_run
from .hardware import GIB, Hardware, find_hardware
from .processes import Processes

# The share of a device's peak FLOP/s that a run is supposed to reach, counting the models' FLOPs alone. Small models on
# large GPUs stay below it, large ones in compiled code come above; the first lines of a run tell.
UTILISATION = 0.3
GPT2_VOCABULARY = 50_257
# What a process holds beside its tensors, roughly: Python with its libraries; on a GPU the context, the workspaces of
# libraries and what the allocator cannot use.
OUTSIDE_TENSORS = {"cpu": GIB // 2, "cuda": GIB}
# A critic of which nothing is known: one so small that it costs nothing but the loss's logits.
_STAND_IN = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "head_dim": 8}


@dataclass(frozen=True)
class Plan:
    """What a run takes. Sizes are in bytes, of one process where they are of memory.

    Args:
        objective: What is minimised.
        hardware: The device of each process.
        precision: ``bf16`` or ``fp32``.
        processes: How many there are.
        parallel: How they hold the player.
        windows: Windows in a process's forward pass, and
        micro_batches: how many of these it makes in an optimiser step.
        parameters: The player's.
        steps: Optimiser steps.
        tokens: Tokens of the whole run.
        flops: Of the whole run, by model: ``player``, ``critic`` and, for ``ppo``, ``snapshot``. Two per weight of
            every matrix and token forward, four backward, and attention over earlier tokens only; the loss computes no
            product twice, so this is also what the hardware does, but for masked attention.
        memory: Tensors of one process by part, at the instant when most is held.
        moment: The phase of the optimiser step in which that is.
        utilisation: The share of the peak FLOP/s supposed.
        checkpoint: One checkpoint.
        checkpoints: How many are kept at the end.
        model_folder: A finished player's folder.
        warnings: What the reader has to know, a line each.
    """

    objective: str
    hardware: Hardware
    precision: str
    processes: int
    parallel: str
    windows: int
    micro_batches: int
    parameters: ParameterCount
    steps: int
    tokens: int
    flops: dict[str, int]
    memory: dict[str, int]
    moment: str
    utilisation: float
    checkpoint: int
    checkpoints: int
    model_folder: int
    warnings: tuple[str, ...]

    @property
    def total_memory(self) -> int:
        """Bytes of all tensors of one process at the highest."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether a process's tensors, and what is beside them, have a place in the device's memory."""
        return self.needed_memory <= self.hardware.memory

    @property
    def needed_memory(self) -> int:
        """Bytes on a device: tensors and roughly what is beside them, of one process, or of all that share a CPU."""
        one = self.total_memory + OUTSIDE_TENSORS[self.hardware.kind]
        return one * self.processes if self.hardware.kind == "cpu" else one

    @property
    def critic_share(self) -> float:
        """The critics' part of all FLOPs."""
        return self.flops["critic"] / sum(self.flops.values())

    @property
    def tokens_per_second(self) -> float:
        """Of all processes, at the supposed utilisation."""
        rate = self.hardware.flops[self.precision] * self.utilisation
        if self.hardware.kind != "cpu":  # there the processes share what was measured
            rate *= self.processes
        return rate * self.tokens / sum(self.flops.values())

    @property
    def hours(self) -> float:
        """Of training alone, without evaluation, compilation and checkpoints."""
        return self.tokens / self.tokens_per_second / 3600

    def __str__(self) -> str:
        return "\n".join(_describe(self))


def plan(
    config: TrainConfig,
    processes: int = 1,
    utilisation: float = UTILISATION,
    vocab_size: int | None = None,
    critic_preset: str | None = None,
    recipe: str | Path | None = None,
) -> Plan:
    """Say what ``config`` takes on ``config.device``, which may also be a GPU's name (``H100``; see :data:`GPUS`).

    Nothing is trained and nothing is fetched. Neither data nor critics need to exist: what is supposed instead stands
    among the warnings.

    Args:
        config: The run.
        processes: How many share it, a device each.
        utilisation: The share of the device's peak FLOP/s to reckon with.
        vocab_size: Tokens of the vocabulary where the data does not exist yet (default: GPT-2's).
        critic_preset: The size of critics that do not exist yet, one of a player's presets.
        recipe: The recipe's file. A critic that does not exist yet may be the output of another recipe beside it.

    Raises:
        UserError: A setting cannot be used, the device is unknown or lacks the precision, or ``epochs`` is given and
            the data does not exist.
    """
    require_whole("processes", processes, minimum=1)
    require_number("utilisation", utilisation, lambda x: 0 < x <= 1, "a number above 0 and at most 1")
    if vocab_size is not None:
        require_whole("vocab_size", vocab_size, minimum=1)
    if critic_preset is not None and critic_preset not in PRESETS:
        raise UserError(f"critic_preset is {critic_preset!r}; expected one of {', '.join(PRESETS)}")
    warnings: list[str] = []
    windows, micro_batches = share_of_step(config, processes)
    vocab_size, steps = _data_facts(config, vocab_size, warnings)

    objective = make_objective(config.objective, config.avatarl, config.baseline)
    critic_names = config.critics if objective.needs_critic else []
    critics = [_critic_shape(name, vocab_size, config, critic_preset, recipe, warnings) for name in critic_names]
    try:
        objective.check_settings(vocab_size, len(critics))
    except ValueError as error:
        raise UserError(str(error)) from error

    hardware = find_hardware(config.device, config.precision)
    precision = hardware.precision(config.precision)
    if precision not in hardware.flops:
        raise UserError(f"precision is {precision!r}, which {hardware.name} has not natively; expected fp32 or auto")
    shape = player_shape(config.player, vocab_size, config.block)
    step = dry_run(config, shape, critics, vocab_size, windows, micro_batches, precision, hardware.kind)
    moment, memory = _memory_of_a_process(step, config, processes, micro_batches, hardware.kind)

    tokens = steps * config.windows_per_step * config.block
    flops = {"player": tokens * step.player_flops, "critic": tokens * step.critic_flops}
    if step.snapshot_flops:
        flops["snapshot"] = tokens * step.snapshot_flops
    return Plan(
        objective=config.objective,
        hardware=hardware,
        precision=precision,
        processes=processes,
        parallel=config.parallel,
        windows=windows,
        micro_batches=micro_batches,
        parameters=step.parameters,
        steps=steps,
        tokens=tokens,
        flops=flops,
        memory=memory,
        moment=moment,
        utilisation=utilisation,
        checkpoint=step.weights + step.optimiser_state + step.snapshot,
        checkpoints=kept_checkpoints(config, steps),
        model_folder=step.weights,
        warnings=tuple(warnings),
    )


def share_of_step(config: TrainConfig, processes: int) -> tuple[int, int]:
    """Windows in one forward pass of a process, and its forward passes in an optimiser step.

    Raises:
        UserError: The processes cannot share a step's windows evenly.
    """
    share = len(Processes(count=processes).share(range(config.windows_per_step)))
    windows = largest_divisor(share, config.batch_windows)
    return windows, share // windows


def kept_checkpoints(config: TrainConfig, steps: int) -> int:
    """How many checkpoints lie on the disk at the end of ``steps`` optimiser steps."""
    written = {*range(config.checkpoint_every_steps, steps + 1, config.checkpoint_every_steps), steps}
    kept = set(sorted(written)[-config.keep_last :])
    return len(kept | {step for step in written if config.keep_every and step % config.keep_every == 0})


def _data_facts(config: TrainConfig, vocab_size: int | None, warnings: list[str]) -> tuple[int, int]:
    """Vocabulary and optimiser steps, from the data where it is there."""
    if (Path(config.data) / MANIFEST).exists():
        manifest = _read_manifest(Path(config.data))[1]
        if vocab_size is not None and vocab_size != manifest["vocab_size"]:
            raise UserError(
                f"vocab_size is {vocab_size}, but {config.data} has {manifest['vocab_size']}; leave vocab_size out"
            )
        windows = (manifest["tokens"]["train"] - 1) // config.block
        return manifest["vocab_size"], config.total_steps(windows)
    if config.steps is None:
        raise UserError(
            f"epochs is {config.epochs}, and {config.data} does not exist; expected steps, or data made by "
            f"`avatarl prepare`"
        )
    if vocab_size is None:
        vocab_size = GPT2_VOCABULARY
        warnings.append(f"{config.data} does not exist: supposing {vocab_size:,} tokens of vocabulary (--vocab_size)")
    return vocab_size, config.steps


# --- critics -------------------------------------------------------------------------------------------------------


def _critic_shape(
    name: str,
    vocab_size: int,
    config: TrainConfig,
    preset: str | None,
    recipe: str | Path | None,
    warnings: list[str],
) -> PreTrainedConfig:
    """The shape of a critic: as it lies on this machine, else as a recipe or ``preset`` says, else next to nothing."""
    if name.startswith("random:"):
        match = RANDOM_CRITIC.fullmatch(name)
        if match is None:
            raise UserError(f"critic is {name!r}; expected random:PRESET:SEED, as random:1m:7")
        return player_shape(PlayerConfig(match[1]), vocab_size, config.block)
    try:
        # A name without a folder may be a hub id; the hub is not asked, only what was fetched before.
        shape = AutoConfig.from_pretrained(resolve_model(name), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError):  # a UserError too
        shape = None
    if shape is not None:
        rows = shape.get_text_config().vocab_size
        if rows < vocab_size:
            raise UserError(f"critic {name} has {rows} output rows for {vocab_size} tokens")
        return shape
    if preset is not None:
        warnings.append(f"critic {name} is not here: supposing a player of preset {preset}")
        player = PlayerConfig(preset)
    elif made := _player_of_recipe_making(name, recipe):
        path, player = made
        warnings.append(f"critic {name} is not here yet: supposing what {path} makes")
    else:
        warnings.append(
            f"critic {name} IS NOT HERE, and its FLOPs, weights and activations ARE LEFT OUT; say its size: "
            f"--critic_preset {' | '.join(PRESETS)}"
        )
        player = PlayerConfig(settings=_STAND_IN)
    return player_shape(player, vocab_size, config.block)


def _player_of_recipe_making(run: str, recipe: str | Path | None) -> tuple[Path, PlayerConfig] | None:
    """The recipe beside ``recipe`` whose output is ``run``, and the player it trains."""
    for path in sorted(Path(recipe).parent.glob("*.yaml")) if recipe else ():
        try:
            settings = yaml.safe_load(path.read_text(encoding="utf-8"))
            if settings["out"] == run:
                return path, PlayerConfig(**settings.get("player", {}))
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):  # not a recipe of ours
            continue
    return None


# --- memory --------------------------------------------------------------------------------------------------------


def _memory_of_a_process(
    step: DryRun, config: TrainConfig, processes: int, micro_batches: int, kind: str
) -> tuple[str, dict[str, int]]:
    """The phase in which one process holds most, and bytes by part in it."""
    phases = {phase: _share_of(parts, step, config, processes, micro_batches) for phase, parts in step.peaks.items()}
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    parts = phases[phase]
    if config.checkpoint_in_background and kind == "cpu":
        parts["checkpoint's copy"] = (step.weights + step.optimiser_state + step.snapshot) // _shards(config, processes)
    return phase, parts


def _shards(config: TrainConfig, processes: int) -> int:
    """Into how many parts the player is divided."""
    return processes if config.parallel == "fsdp" else 1


def _share_of(
    parts: dict[str, int], step: DryRun, config: TrainConfig, processes: int, micro_batches: int
) -> dict[str, int]:
    """What one of several processes holds, where one alone holds ``parts``."""
    parts = dict(parts)
    if processes == 1:
        return parts
    if config.parallel == "ddp":
        parts["gradients"] = step.weights  # they lie in the buckets that are exchanged, and those stay
        return parts
    for name in ("weights", "optimiser state", "snapshot"):
        parts[name] = math.ceil(parts[name] / processes)
    if micro_batches == 1:
        parts["gradients"] = math.ceil(parts["gradients"] / processes) + step.gathered
    # Otherwise each process adds up whole gradients, which are exchanged after the last micro-batch.
    parts["gathered layers"] = step.gathered + (step.gathered if step.snapshot else 0)
    if config.shard_critics:
        parts["critics"] = math.ceil(parts["critics"] / processes)
        parts["gathered layers"] += step.gathered_critics
    return parts


# --- the table -----------------------------------------------------------------------------------------------------


def _describe(plan: Plan) -> list[str]:
    """The lines of a plan's text."""
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
    return [
        f"{plan.objective} on {several}{hardware.name}, {plan.precision}{f', {plan.parallel}' if several else ''}",
        "",
        f"  parameters   {plan.parameters.total:,} ({plan.parameters.non_embedding:,} outside the embedding)",
        f"  tokens       {plan.tokens:,} in {plan.steps:,} steps of {plan.tokens // plan.steps:,}",
        f"  FLOPs        {flops}",
        f"  speed        {plan.tokens_per_second:,.0f} tokens per second, supposing {plan.utilisation:.0%} of {peak}",
        f"  time         {_duration(plan.hours)} of training",
        f"  checkpoint   {_bytes(plan.checkpoint)}{kept}",
        f"  model        {_bytes(plan.model_folder)}, the finished folder",
        "",
        f"  memory of one process, with {plan.windows} windows at a time; highest in the {plan.moment} phase",
        *(f"    {part:<22}{_bytes(amount):>12}" for part, amount in rows),
        f"  {_bytes(plan.needed_memory)} for {whose} {verdict} {_bytes(hardware.memory)}",
        *(f"  ! {warning}" for warning in plan.warnings),
    ]


def _bytes(amount: int) -> str:
    """In MiB, or GiB from 1 GiB on."""
    return f"{amount / GIB:,.2f} GiB" if amount >= GIB else f"{amount / 2**20:,.1f} MiB"


def _duration(hours: float) -> str:
    """In the unit that suits."""
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} seconds"
    return f"{60 * hours:.1f} minutes" if hours < 2 else f"{hours:,.1f} hours"
