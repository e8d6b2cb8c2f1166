"""What a run will take, before it is started: parameters, FLOPs, memory, time and disk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from avatarl.errors import UserError
from avatarl.models import PRESETS, ParameterCount, PlayerConfig
from avatarl.models.critic_cache import RecordFormat
from avatarl.models.critics import parse_ema_critic
from avatarl.models.players import player_shape
from avatarl.objective import make_objective
from avatarl.objective.config import require_number, require_whole
from avatarl.training.config import TrainConfig
from avatarl.training.processes import Processes
from avatarl.training.schedule import Schedules

from .assumptions import critic_shape, data_facts
from .dry_run import DryRun, dry_run
from .hardware import Hardware, find_hardware

# The share of a device's peak FLOP/s that a run is supposed to reach, counting the models' FLOPs alone. Small models on
# large GPUs stay below it, large ones in compiled code come above; the first lines of a run tell.
UTILISATION = 0.3
# In the place of a critic of which nothing is known: so small that only its logits, whose size is known, take memory.
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
        one = self.total_memory + self.hardware.outside_tensors
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
    vocab_size, steps = data_facts(config, vocab_size, warnings)

    objective = make_objective(config.objective, config.avatarl, config.baseline)
    critic_names = config.critics if objective.needs_critic else []
    critics = [critic_shape(name, vocab_size, config, critic_preset, recipe, warnings) for name in critic_names]
    stand_in = player_shape(PlayerConfig(settings=_STAND_IN), vocab_size, config.block_size)
    stored = [(critic.num_top, critic.num_draws) for critic in critics if isinstance(critic, RecordFormat)]
    start_steps = [parse_ema_critic(name)[1] if name.startswith("ema:") else 0 for name in critic_names]
    try:
        objective.check_settings(vocab_size, len(critics), stored)
        schedules = Schedules(config.schedules, objective, start_steps, steps)
    except ValueError as error:
        raise UserError(str(error)) from error

    hardware = find_hardware(config.device, config.precision)
    precision = hardware.precision(config.precision)
    if precision not in hardware.flops:
        raise UserError(f"precision is {precision!r}, which {hardware.name} has not natively; expected fp32 or auto")
    shape = player_shape(config.player, vocab_size, config.block_size)
    shapes = [critic or stand_in for critic in critics]
    averaged = [name.startswith("ema:") for name in critic_names]
    step = dry_run(config, shape, shapes, averaged, vocab_size, windows, micro_batches, precision, hardware.kind)
    moment, memory = _memory_of_a_process(step, config, processes, micro_batches, hardware.kind)
    if not any(critics):  # what stood in for them is none of the run's
        memory["critics"] = memory["critics' activations"] = 0

    tokens = steps * config.windows_per_step * config.block_size
    critic_flops = sum(
        schedules.steps_of(place) * config.windows_per_step * config.block_size * step.critic_flops[place]
        for place, critic in enumerate(critics)
        if critic
    )
    flops = {"player": tokens * step.player_flops, "critic": critic_flops}
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
        checkpoint=step.weights * (1 + sum(averaged)) + step.optimiser_state + step.snapshot,
        checkpoints=kept_checkpoints(config, steps),
        model_folder=step.weights,
        warnings=tuple(warnings),
    )


def share_of_step(config: TrainConfig, processes: int) -> tuple[int, int]:
    """Windows in a process's largest forward pass, and its forward passes in an optimiser step.

    Raises:
        UserError: The processes cannot share a step's windows evenly.
    """
    share = len(Processes(count=processes).share(range(config.windows_per_step)))
    passes = math.ceil(share / config.micro_batch_size)
    return math.ceil(share / passes), passes


def kept_checkpoints(config: TrainConfig, steps: int) -> int:
    """How many checkpoints lie on the disk at the end of ``steps`` optimiser steps."""
    written = {*range(config.checkpoint_every_steps, steps + 1, config.checkpoint_every_steps), steps}
    kept = set(sorted(written)[-config.keep_last :])
    return len(kept | {step for step in written if config.keep_every and step % config.keep_every == 0})


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
        parts["gradients"] = math.ceil(parts["gradients"] / processes) + min(parts["gradients"], step.gathered)
    # Otherwise each process adds up whole gradients, which are exchanged after the last micro-batch.
    parts["gathered layers"] = step.gathered + (step.gathered if step.snapshot else 0)
    if config.shard_critics:
        parts["critics"] = math.ceil(parts["critics"] / processes)
        parts["gathered layers"] += step.gathered_critics
    return parts
