"""What a run is made of, before its first step: data, player, critics, objective, optimisers, where they compute."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from avatarl.data import PreparedData, WindowOrder, Windows
from avatarl.device import pick_device, pick_precision
from avatarl.errors import UserError
from avatarl.models import Critic, build_player, count_parameters, open_critic, training_flops_per_token
from avatarl.models.counting import ParameterCount
from avatarl.models.critics import LiveCritic, Snapshot
from avatarl.models.digest import digest_of_tokenizer
from avatarl.objective import Objective, make_objective
from avatarl.objective.engine import is_compiled
from avatarl.places import kept
from avatarl.run_dir.identity import MUON, settings_digest

from .batch import Batch
from .config import TrainConfig
from .draws import uniforms_of
from .optim import Optimisers, build_optimisers, muon_precision
from .processes import Processes
from .rewarded_player import RewardedPlayer
from .schedule import Schedules
from .validation import Validation


@dataclass(frozen=True)
class Reached:
    """How far a run is, and what that took. It is kept, for the settings of the steps before may have been others."""

    step: int = 0
    windows: int = 0  # read, and so the place of the next one in the endless order
    tokens: int = 0
    player_flops: int = 0
    critic_flops: int = 0
    caches: dict[str, int] = field(default_factory=dict)  # FLOPs that each took, by its digest


@dataclass
class Setup:
    """The parts of one run on one process."""

    config: TrainConfig
    processes: Processes
    device: torch.device
    precision: str  # bf16 or fp32
    data: PreparedData
    tokenizer: PreTrainedTokenizerBase
    windows: Windows
    order: WindowOrder
    objective: Objective
    critics: list[Critic]
    snapshot: Snapshot | None  # the earlier player that ``ppo`` draws its actions from
    schedules: Schedules
    player: PreTrainedModel
    player_flops: int  # of a forward and a backward pass of it, per token
    parameters: ParameterCount  # of it
    model: RewardedPlayer  # player and objective
    step_model: nn.Module  # what training calls: the model, compiled and wrapped as asked for
    optimisers: Optimisers
    validation: Validation
    total_steps: int
    identity: dict[str, str]
    begun_at: Reached = field(default_factory=Reached)  # where this process took the run up

    @property
    def autocast(self) -> AbstractContextManager:
        if self.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    @property
    def tokens_per_step(self) -> int:
        return self.config.windows_per_step * self.config.block_size

    def go_on_from(self, reached: Reached) -> None:
        """Take the run up where it was left; ``epochs`` count what was read.

        Raises:
            UserError: A schedule ends after the run.
        """
        self.begun_at = reached
        self.total_steps = self.config.total_steps(len(self.windows), reached.step, reached.windows)
        self.schedules = self.schedules.over(self.total_steps)
        self.optimisers.total_steps = self.total_steps

    def reached_after(self, step: int) -> Reached:
        """How far the run is after ``step``, evaluations aside, counted from where this process took it up."""
        begun = self.begun_at
        steps, tokens = step - begun.step, (step - begun.step) * self.tokens_per_step
        critics = sum(
            (self.schedules.steps_of(critic, step) - self.schedules.steps_of(critic, begun.step))
            * critic.flops_per_token
            for critic in self.critics
        )
        return Reached(
            step,
            begun.windows + steps * self.config.windows_per_step,
            begun.tokens + tokens,
            begun.player_flops + tokens * self.player_flops,
            begun.critic_flops + critics * self.tokens_per_step,
            begun.caches | {digest: flops for critic in self.critics for digest, flops in critic.costs.items()},
        )

    def windows_of_step(self, step: int) -> range:
        """The places in the endless order of training that optimiser step ``step``, counted from 1, reads."""
        return range(self.reached_after(step - 1).windows, self.reached_after(step).windows)

    def batches(self, step: int) -> Iterator[Batch]:
        """This process's windows of one optimiser step, a micro-batch at a time.

        Which windows a step has does not depend on the number of processes.
        """
        samples = self.schedules.stage(step).objective.num_uniforms
        mine = self.processes.share(self.windows_of_step(step))
        passes = math.ceil(len(mine) / self.config.micro_batch_size)
        for places in np.array_split(mine, passes):  # of equal size, or one window more
            indices = self.order.indices(places[0], len(places))
            uniforms = uniforms_of(self.config.seed, places, self.config.block_size, samples)
            yield Batch(*self.windows.batch(indices), uniforms, "train", indices).to(self.device)

    @property
    def kept_critics(self) -> dict[str, LiveCritic]:
        """Those whose weights checkpoints hold, by the names of their files."""
        averages = [critic for critic in self.critics if critic.keeps_state]
        kept = {f"average{number}": critic for number, critic in enumerate(averages)}
        return kept | ({"snapshot": self.snapshot} if self.snapshot else {})

    def check_files(self) -> None:
        """Check that the files of data and critics have not changed since the run started.

        Raises:
            RunFailed: One has; it is named.
        """
        for opened in (self.data, *self.critics):
            opened.check()

    def spent_until(self, step: int) -> dict[str, int]:
        """What the first ``step`` steps take, evaluations aside.

        Returns:
            ``tokens`` of training; ``player_flops``, of the player's forward and backward passes; ``critic_flops``, of
            the critics' forward passes, where they run beside the player.
        """
        reached = self.reached_after(step)
        return {name: getattr(reached, name) for name in ("tokens", "player_flops", "critic_flops")}

    @property
    def sizes(self) -> dict[str, int]:
        """Of the player and of the whole run: parameters, tokens and FLOPs.

        ``unique_tokens`` are those of an epoch.
        ``cached_critic_flops`` were spent elsewhere: on critics' passes over the training windows of caches.
        """
        return {
            "parameters": self.parameters.total,
            "non_embedding_parameters": self.parameters.non_embedding,
            "unique_tokens": len(self.windows) * self.config.block_size,
            **self.spent_until(self.total_steps),
            "cached_critic_flops": sum(self.reached_after(self.total_steps).caches.values()),
        }

    def describe(self) -> str:
        """One line that says what is being trained on what."""
        tokens = self.spent_until(self.total_steps)["tokens"]
        epochs = tokens / (len(self.windows) * self.config.block_size)
        several = f", {self.processes.count} processes ({self.config.parallel})" if self.processes.count > 1 else ""
        return (
            f"{self.config.objective}: {self.parameters.total:,} parameters "
            f"({self.parameters.non_embedding:,} outside the embedding), {self.total_steps:,} steps, "
            f"{tokens:,} tokens ({epochs:.2f} epochs), {self.device} {self.precision}{several}"
        )


def set_up(config: TrainConfig, processes: Processes) -> Setup:
    """Open and build everything; nothing is written.

    Raises:
        UserError: A setting, the data or a critic cannot be used.
    """
    data = processes.after_main(lambda verified: PreparedData.open(config.data, verified=verified))
    tokenizer = data.load_tokenizer()
    windows = Windows(data.train, config.block_size, config.train_windows)
    valid_windows = Windows(data.valid, config.block_size)
    total_steps = config.total_steps(len(windows))
    processes.share(range(config.windows_per_step))  # refuses what cannot be shared

    device = pick_device(config.device, processes.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    precision = pick_precision(config.precision, device)
    objective = make_objective(config.objective, config.avatarl, config.baseline)
    names = config.critics if objective.needs_critic else []
    if objective.needs_critic and not names:
        raise UserError(f"objective {config.objective!r} needs a critic, and critic is empty; give a run or a model")

    def new_player() -> PreTrainedModel:
        return build_player(config.player, tokenizer, config.block_size, config.seed).to(device)

    critics = [
        open_critic(
            name,
            tokenizer,
            block_size=config.block_size,
            data=data,
            train_windows=config.train_windows,
            build_player=new_player,
            dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
            device=device,
            quantization=config.critic_quantization,
            after_main=processes.after_main,
        )
        for name in names
    ]
    loss_impl = "compiled" if config.loss_impl == "auto" and config.compile else config.loss_impl
    try:
        objective.check_settings(len(tokenizer), [critic.limits for critic in critics])
    except ValueError as error:
        raise UserError(str(error)) from error
    player = new_player()
    schedules = Schedules(config.schedules, objective, critics, total_steps, device)
    # Counted before anything is divided among processes.
    parameters, player_flops = count_parameters(player), training_flops_per_token(player, config.block_size)
    identity = processes.ask_main(lambda: identity_of_run(config, precision, data, critics))
    if config.optim.name == "muon":
        identity[MUON] = muon_precision(device)

    snapshot = Snapshot("snapshot", new_player()) if objective.needs_snapshot else None
    frozen = [*critics, *([snapshot] if snapshot else [])]
    model = RewardedPlayer(player, objective, len(tokenizer), is_compiled(loss_impl))
    if config.parallel == "fsdp" and processes.count > 1:
        for critic in frozen:
            critic.shard(partial(processes.shard, device=device, keep_root=True), config.shard_critics)
        processes.shard(model, player, device)
    if config.compile:
        for critic in frozen:
            critic.compile()
    step_model = torch.compile(model) if config.compile else model
    return Setup(
        config=config,
        processes=processes,
        device=device,
        precision=precision,
        data=data,
        tokenizer=tokenizer,
        windows=windows,
        order=WindowOrder(len(windows), config.seed),
        objective=objective,
        critics=critics,
        snapshot=snapshot,
        schedules=schedules,
        player=player,
        player_flops=player_flops,
        parameters=parameters,
        model=model,
        step_model=processes.wrap(step_model, config.parallel, device),
        optimisers=build_optimisers(player, config.optim, total_steps),
        validation=Validation(valid_windows, config, device, processes),
        total_steps=total_steps,
        identity=identity,
    )


def identity_of_run(
    config: TrainConfig, precision: str, data: PreparedData, critics: Sequence[Critic]
) -> dict[str, str]:
    """What decides a run's course: precision, and the SHA-256 of settings, data, tokenizer and each critic."""
    return {
        "settings": settings_digest(kept(config.as_dict())),
        "precision": precision,
        "data": data.digest,
        "tokenizer": digest_of_tokenizer(data),
        **{f"critic {critic.name}": critic.digest for critic in critics},
    }
