"""What a run is made of. Field names are the keys of a recipe and the options of ``avatarl train``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from avatarl.errors import UserError, nearest_name
from avatarl.models import PlayerConfig
from avatarl.objective import OBJECTIVES, AvataRLConfig, BaselineConfig
from avatarl.objective.config import require_kinds, require_number, require_whole


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser and the learning rate over time.

    Args:
        name: ``adamw``, or ``muon`` for the matrices between the embeddings with AdamW for the rest.
        learning_rate: The highest learning rate, reached after warm-up.
        weight_decay: Decoupled decay of matrices; vectors (norms, biases) have none.
        beta1: AdamW's decay of the gradient's mean.
        beta2: AdamW's decay of the gradient's square.
        warmup_steps: Optimiser steps of linear warm-up.
        decay: The shape of the fall after it, ``cosine`` or ``linear``.
        final_lr_fraction: What the learning rate falls towards, as a fraction of ``learning_rate``.
        clip_norm: The gradient's norm is clipped to this (None: not clipped).
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    warmup_steps: int = 50
    decay: Literal["cosine", "linear"] = "cosine"
    final_lr_fraction: float = 0.1
    clip_norm: float | None = 1.0

    def __post_init__(self):
        require_kinds(self, "optim.")
        require_number("optim.learning_rate", self.learning_rate, lambda x: x > 0, "a number above 0")
        require_number("optim.weight_decay", self.weight_decay, lambda x: x >= 0, "a number of at least 0")
        require_number("optim.beta1", self.beta1, lambda x: 0 <= x < 1, "a number in [0, 1)")
        require_number("optim.beta2", self.beta2, lambda x: 0 <= x < 1, "a number in [0, 1)")
        require_whole("optim.warmup_steps", self.warmup_steps, minimum=0)
        require_number("optim.final_lr_fraction", self.final_lr_fraction, lambda x: 0 <= x <= 1, "a number in [0, 1]")
        if self.clip_norm is not None:
            require_number("optim.clip_norm", self.clip_norm, lambda x: x > 0, "a number above 0, or null")


@dataclass(frozen=True)
class GuardConfig:
    """Which updates to skip, and when to stop. Updates with a non-finite loss or gradient are always skipped.

    Args:
        stop_after: Stop the run after so many skipped updates in a row.
        spike_score: Skip an update whose loss lies so many robust standard deviations above the median of the last
            accepted losses (None: never).
        spike_window: How many accepted losses to compare with.
    """

    stop_after: int = 5
    spike_score: float | None = None
    spike_window: int = 100

    def __post_init__(self):
        require_whole("guard.stop_after", self.stop_after, minimum=1)
        require_whole("guard.spike_window", self.spike_window, minimum=2)
        if self.spike_score is not None:
            require_number("guard.spike_score", self.spike_score, lambda x: x > 0, "a number above 0, or null")


@dataclass(frozen=True)
class Schedule:
    """How a setting changes over a run: it is multiplied by a factor that starts at 1.

    Args:
        shape: ``constant``; ``linear`` or ``cosine``, a fall over steps; ``first``, a jump after ``end_step``.
        final_fraction: The factor at the end.
        start_step: The step after which a linear or cosine fall starts.
        end_step: The step after which the factor is the final one (None: the run's last step, so it is not reached).
    """

    shape: Literal["constant", "linear", "cosine", "first"] = "constant"
    final_fraction: float = 0.0
    start_step: int = 0
    end_step: int | None = None

    @property
    def is_constant(self) -> bool:
        """Whether nothing changes."""
        return self.shape == "constant"


@dataclass(frozen=True)
class ScheduleConfig:
    """Settings that change over the steps.

    Args:
        critic_weight: The weight of every critic; the text gains what they lose. At 0 they are no longer run, and
            their memory is freed.
        smoothing: ε of the reality expert.
        entropy_coef: β, the weight of the policy's entropy.
    """

    critic_weight: Schedule = Schedule()
    smoothing: Schedule = Schedule()
    entropy_coef: Schedule = Schedule()

    def items(self) -> tuple[tuple[str, Schedule], ...]:
        """Each schedule with its name."""
        return tuple((name, getattr(self, name)) for name in ("critic_weight", "smoothing", "entropy_coef"))

    def __post_init__(self):
        require_kinds(self, "schedules.")
        for name, schedule in self.items():
            field = f"schedules.{name}"
            require_kinds(schedule, f"{field}.")
            if schedule.is_constant and schedule != Schedule():
                raise UserError(f"{field}.shape is 'constant', so its other settings have no effect; give a shape")
            if name == "critic_weight":
                accepted = (lambda x: 0 <= x <= 1), "a number in [0, 1]"
            else:
                accepted = (lambda x: x >= 0), "a number of at least 0"
            require_number(f"{field}.final_fraction", schedule.final_fraction, *accepted)
            require_whole(f"{field}.start_step", schedule.start_step, minimum=0)
            if schedule.end_step is not None:
                require_whole(f"{field}.end_step", schedule.end_step, minimum=schedule.start_step + 1)
            if schedule.shape == "first" and schedule.end_step is None:
                raise UserError(f"{field}.end_step is null; shape 'first' needs the step after which it changes")


def idle_settings(settings: Mapping[str, Any]) -> set[str]:
    """The settings of a recipe, by dotted names, that have no effect beside the others; none if these are not valid.

    They are those of other objectives, critics that the objective does not use, and the window of a guard that is off.
    """
    groups = {
        group: {name.removeprefix(group): value for name, value in settings.items() if name.startswith(group)}
        for group in ("avatarl.", "baseline.")
    }
    try:
        objective = OBJECTIVES[settings["objective"]]
        needs_critic = objective.needs_critic(
            AvataRLConfig(**groups["avatarl."]), BaselineConfig(**groups["baseline."])
        )
    except (ValueError, ArithmeticError, AttributeError, LookupError, TypeError):  # UserError among them
        return set()
    idle = {name for name in settings if name.startswith(tuple(groups)) and not name.startswith(objective.settings)}
    if not needs_critic:
        idle |= {"critic", "critic_quantization", "shard_critics"}
    if settings.get("guard.spike_score") is None:
        idle.add("guard.spike_window")
    return idle


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Args:
        data: A prepared data folder.
        out: The run folder to make.
        objective: What is minimised: avatarl, cross_entropy, label_smoothing, distillation, expected_reward, reinforce
            or ppo.
        critic: A critic, or several: run folders, model folders, hub ids, caches of critics (``avatarl critic cache``),
            ``ema:DECAY:START_STEP``, the player's own moving average from that step on, or ``random:PRESET:SEED``, one
            that knows nothing. If the objective uses no critic, the run has none, whatever is given.
        critic_quantization: How to quantise the critics' weights, as transformers writes it in config.json:
            ``{quant_method: bitsandbytes, load_in_8bit: true}`` or torchao's (None: not, but for those saved so).
        avatarl: Settings of the rewards and the AvataRL loss.
        baseline: Settings of the other objectives.
        schedules: Critic weight, ε and entropy coefficient over the steps.
        player: Which model to train.
        optim: Optimiser and learning rate.
        guard: Which updates to skip.
        block_size: Tokens in a window.
        micro_batch_size: The most windows in one forward pass of a process.
        gradient_accumulation_steps: Forward passes in one optimiser step on one process. Several processes share the
            step's ``micro_batch_size · gradient_accumulation_steps`` windows.
        steps: Optimiser steps. Give this or ``epochs``.
        epochs: Passes over the training windows. Give this or ``steps``.
        train_windows: Train on so many windows of the training split only, spread evenly over it, the same for every
            seed: scarcer text (None: all).
        seed: Decides initial weights, data order, dropout and sampled actions.
        precision: ``bf16`` autocast, ``fp32``, or ``auto``: bf16 where the device multiplies it natively.
        device: ``cpu``, ``cuda``, or ``auto``.
        compile: Whether to compile player, critics and loss with ``torch.compile`` (a minute at the start).
        loss_impl: What computes the loss: ``chunked`` (plain PyTorch), ``compiled``, or ``auto``: ``compiled`` when
            ``compile`` is on, otherwise what was timed on that kind of device.
        parallel: How several processes hold the player: ``ddp``, each the whole of it, or ``fsdp``, each a part of
            its weights, gradients and optimiser state (FSDP2).
        shard_critics: With ``fsdp``, whether critics are divided too.
        eval_every_steps: Steps between two evaluations; there is always one at the end.
        eval_windows: Windows of the validation split to evaluate on, spread evenly, always the same (None: all).
        log_every_steps: Steps between two lines of metrics, which are averages over them.
        checkpoint_every_steps: Steps between two checkpoints; there is always one at the end.
        checkpoint_in_background: Whether to write checkpoints beside training, from a copy. While one is being
            written, further ones are left out.
        keep_last: How many of the newest checkpoints to keep.
        keep_every: Also keep those of steps divisible by this (None: no others).
        tensorboard: Whether to write TensorBoard events beside metrics.jsonl.
        tracker: Also follow the run in ``trackio`` or ``wandb`` (None: in neither); docs/publishing.md.
    """

    data: str
    out: str
    objective: str = "avatarl"
    critic: str | list[str] | None = None
    critic_quantization: dict[str, Any] | None = None
    avatarl: AvataRLConfig = field(default_factory=AvataRLConfig)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    schedules: ScheduleConfig = field(default_factory=ScheduleConfig)
    player: PlayerConfig = field(default_factory=PlayerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    block_size: int = 256
    micro_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    steps: int | None = None
    epochs: float | None = None
    train_windows: int | None = None
    seed: int = 1
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    device: str = "auto"
    compile: bool = False
    loss_impl: Literal["auto", "chunked", "compiled"] = "auto"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    shard_critics: bool = False
    eval_every_steps: int = 500
    eval_windows: int | None = 64
    log_every_steps: int = 10
    checkpoint_every_steps: int = 500
    checkpoint_in_background: bool = False
    keep_last: int = 2
    keep_every: int | None = None
    tensorboard: bool = True
    tracker: Literal["trackio", "wandb"] | None = None

    def __post_init__(self):
        for name in ("data", "out", "critic"):  # a Path is welcome, and a string is what a YAML file holds
            if isinstance(getattr(self, name), Path):
                object.__setattr__(self, name, str(getattr(self, name)))
        if isinstance(self.critic, (list, tuple)):
            object.__setattr__(self, "critic", [str(name) for name in self.critic])
        require_kinds(self)
        if self.objective not in OBJECTIVES:
            raise UserError(
                f"objective is {self.objective!r}; expected one of {', '.join(sorted(OBJECTIVES))}"
                f"{nearest_name(self.objective, OBJECTIVES)}"
            )
        for name in (
            "block_size",
            "micro_batch_size",
            "gradient_accumulation_steps",
            "eval_every_steps",
            "log_every_steps",
            "checkpoint_every_steps",
            "keep_last",
        ):
            require_whole(name, getattr(self, name), minimum=1)
        require_whole("seed", self.seed, minimum=0)
        if self.seed >= 1 << 63:
            raise UserError(f"seed is {self.seed}; expected a whole number below 2^63")
        if self.shard_critics and self.critic_quantization is not None:
            raise UserError("shard_critics is true, and critic_quantization is given; expected one of them at most")
        for name in ("train_windows", "eval_windows", "keep_every"):
            if getattr(self, name) is not None:
                require_whole(name, getattr(self, name), minimum=1)
        if (self.steps is None) == (self.epochs is None):
            raise UserError(f"steps is {self.steps} and epochs is {self.epochs}; expected exactly one of them")
        if self.steps is not None:
            require_whole("steps", self.steps, minimum=1)
        else:
            require_number("epochs", self.epochs, lambda x: x > 0, "a number above 0")

    @property
    def windows_per_step(self) -> int:
        """Windows in one optimiser step."""
        return self.micro_batch_size * self.gradient_accumulation_steps

    def windows_per_process(self, process_count: int) -> int:
        """Windows of a step in each process; UserError if they cannot be shared evenly."""
        if self.windows_per_step % process_count:
            raise UserError(
                f"micro_batch_size times gradient_accumulation_steps is {self.windows_per_step}, which {process_count} "
                f"processes cannot share; expected a multiple of {process_count}"
            )
        return self.windows_per_step // process_count

    def total_steps(self, train_windows: int, taken: int = 0, windows_read: int = 0) -> int:
        """Optimiser steps of the run, given the number of training windows and what of ``epochs`` is done already.

        Args:
            train_windows: In an epoch.
            taken: Steps that were taken, perhaps of other sizes.
            windows_read: In them.
        """
        ahead = taken - windows_read / self.windows_per_step  # 0 where all were of this size
        return self.steps or max(1, round(self.epochs * train_windows / self.windows_per_step + ahead))

    @property
    def critics(self) -> list[str]:
        """The critics as a list."""
        return [self.critic] if isinstance(self.critic, str) else list(self.critic or [])

    def as_dict(self) -> dict:
        """Plain dictionaries, lists and numbers, as a recipe has them."""
        plain = dataclasses.asdict(self)
        weight = plain["avatarl"]["critic_weight"]
        plain["avatarl"]["critic_weight"] = list(weight) if isinstance(weight, tuple) else weight
        return plain

    def as_yaml(self) -> str:
        """Every setting; ``avatarl train --config`` reads it back."""
        return yaml.safe_dump(self.as_dict(), sort_keys=False)
