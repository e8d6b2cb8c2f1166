"""What a run is made of, before its first step: data, player, critics, objective, optimisers, where they compute."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from avatarl.data import PreparedData, WindowOrder, Windows
from avatarl.device import pick_device, pick_precision
from avatarl.errors import UserError
from avatarl.models import CriticCache, build_player, count_parameters, load_critic, training_flops_per_token
from avatarl.models.counting import ParameterCount, forward_flops_per_token
from avatarl.models.critic_cache import is_cache
from avatarl.models.critics import parse_ema_critic
from avatarl.models.digest import digest_of_model, digest_of_tokenizer
from avatarl.models.loading import check_window, longest_sequence
from avatarl.objective import Objective, make_objective
from avatarl.objective.fused.implementations import check_implementation
from avatarl.places import kept
from avatarl.run_dir.identity import MUON, settings_digest

from .batch import Batch
from .config import TrainConfig
from .draws import uniform_draws
from .optim import Optimisers, build_optimisers, muon_precision
from .processes import Processes
from .rewarded_player import AveragedPlayer, FrozenModel, RewardedPlayer
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
    critic_names: list[str]  # of those that judge
    critic_flops: list[int]  # of a forward pass of each of them, per token; 0 of a cached one
    caches: dict[int, CriticCache]  # of those of them that are not asked themselves, by place
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
            (self.schedules.steps_of(i, step) - self.schedules.steps_of(i, begun.step)) * per_token
            for i, per_token in enumerate(self.critic_flops)
        )
        return Reached(
            step,
            begun.windows + steps * self.config.windows_per_step,
            begun.tokens + tokens,
            begun.player_flops + tokens * self.player_flops,
            begun.critic_flops + critics * self.tokens_per_step,
            begun.caches | {cache.digest: cache.flops for cache in self.caches.values()},
        )

    def windows_of_step(self, step: int) -> range:
        """The places in the endless order of training that optimiser step ``step``, counted from 1, reads."""
        return range(self.reached_after(step - 1).windows, self.reached_after(step).windows)

    def batches(self, step: int) -> Iterator[Batch]:
        """This process's windows of one optimiser step, a micro-batch at a time.

        Which windows a step has does not depend on the number of processes.
        """
        stage, scheduled = self.schedules.stage(step), self.schedules.values(step)
        caches = [self.caches[i] for i in stage.critics if i in self.caches]
        mine = self.processes.share(self.windows_of_step(step))
        passes = math.ceil(len(mine) / self.config.micro_batch_size)
        for places in np.array_split(mine, passes):  # of equal size, or one window more
            indices = self.order.indices(places[0], len(places))
            draws = uniform_draws(self.config.seed, places, self.config.block_size, stage.objective.num_draws)
            stored = [cache.rows("train", indices) for cache in caches]
            yield Batch(*self.windows.batch(indices), draws, stored, scheduled).to(self.device)

    def check_files(self) -> None:
        """Look whether data and caches are still what they were when the run started.

        Raises:
            RunFailed: One is not; it is named.
        """
        for opened in (self.data, *self.caches.values()):
            opened.check()

    def spent_until(self, step: int) -> dict[str, int]:
        """What the first ``step`` steps take, evaluations aside.

        Returns:
            ``tokens`` of training; ``player_flops``, of the player's forward and backward passes; ``critic_flops``, of
            the critics' forward passes, where they judge and are not cached.
        """
        reached = self.reached_after(step)
        return {name: getattr(reached, name) for name in ("tokens", "player_flops", "critic_flops")}

    @property
    def sizes(self) -> dict[str, int]:
        """Of the player and of the whole run: parameters, tokens and FLOPs.

        ``unique_tokens`` are those of an epoch.
        ``cached_critic_flops`` were spent elsewhere: on critics' passes over the training windows of its caches.
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
    critic_names = config.critics if objective.needs_critic else []
    if objective.needs_critic and not critic_names:
        raise UserError(f"objective {config.objective!r} needs a critic, and critic is empty; give a run or a model")
    critics = open_critics(critic_names, config, processes, data, tokenizer, precision, device)
    loss_impl = "compiled" if config.loss_impl == "auto" and config.compile else config.loss_impl
    try:
        stored = [(cache.record.num_top, cache.record.num_draws) for cache in critics if isinstance(cache, CriticCache)]
        objective.check_settings(len(tokenizer), len(critics), stored)
        check_implementation(loss_impl, device.type)
    except ValueError as error:
        raise UserError(str(error)) from error
    player = build_player(config.player, tokenizer, config.block_size, config.seed).to(device)
    start_steps = [critic.start_step if isinstance(critic, AveragedPlayer) else 0 for critic in critics]
    schedules = Schedules(config.schedules, objective, start_steps, total_steps, device)
    caches = {place: critic for place, critic in enumerate(critics) if isinstance(critic, CriticCache)}
    # Counted before anything is divided among processes.
    parameters, player_flops = count_parameters(player), training_flops_per_token(player, config.block_size)
    critic_flops = [
        0 if isinstance(critic, CriticCache) else forward_flops_per_token(critic.model, config.block_size)
        for critic in critics
    ]
    named = dict(zip(critic_names, critics, strict=True))
    identity = processes.ask_main(lambda: identity_of_run(config, precision, data, named))
    if config.optim.name == "muon":
        identity[MUON] = muon_precision(device)

    asked = [None if place in caches else critic for place, critic in enumerate(critics)]
    snapshot = None
    if objective.needs_snapshot:
        snapshot = FrozenModel(build_player(config.player, tokenizer, config.block_size, config.seed).to(device))
    model = RewardedPlayer(player, objective, asked, len(tokenizer), loss_impl, snapshot)
    if config.parallel == "fsdp" and processes.count > 1:
        others = [critic for critic in asked if critic and (config.shard_critics or critic in model.averages)]
        for judge in (*others, *([snapshot] if snapshot else [])):
            processes.shard(judge, judge.model, device, keep_root=True)
        processes.shard(model, player, device)
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
        critic_names=critic_names,
        critic_flops=critic_flops,
        caches=caches,
        schedules=schedules,
        player=player,
        player_flops=player_flops,
        parameters=parameters,
        model=model,
        step_model=processes.wrap(step_model, config.parallel, device),
        optimisers=build_optimisers(player, config.optim, total_steps),
        validation=Validation(valid_windows, config, device, processes, caches),
        total_steps=total_steps,
        identity=identity,
    )


def identity_of_run(
    config: TrainConfig, precision: str, data: PreparedData, critics: Mapping[str, FrozenModel | CriticCache]
) -> dict[str, str]:
    """What decides a run's course: precision, and the SHA-256 of settings, data, tokenizer and each critic."""
    digests = {
        f"critic {name}": critic.digest if isinstance(critic, CriticCache) else digest_of_model(critic.model)
        for name, critic in critics.items()
    }
    return {
        "settings": settings_digest(kept(config.as_dict())),
        "precision": precision,
        "data": data.digest,
        "tokenizer": digest_of_tokenizer(data),
        **digests,
    }


def open_critics(
    names: Sequence[str],
    config: TrainConfig,
    processes: Processes,
    data: PreparedData,
    tokenizer: PreTrainedTokenizerBase,
    precision: str,
    device: torch.device,
) -> list[FrozenModel | CriticCache]:
    """The critics of these names.

    Raises:
        UserError: One cannot be opened, or reads sequences shorter than a window.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    critics: list[FrozenModel | CriticCache] = []
    for name in names:
        if is_cache(name):
            critics.append(
                processes.after_main(
                    lambda verified, name=name: CriticCache.open(
                        name, data, config.block_size, config.train_windows, verified=verified
                    )
                )
            )
        elif name.startswith("ema:"):
            average = build_player(config.player, tokenizer, config.block_size, config.seed).to(device)
            critics.append(AveragedPlayer(average, *parse_ema_critic(name)))
        else:
            critic = load_critic(name, tokenizer, dtype, device, config.critic_quantization)
            longest = longest_sequence(critic)
            if longest is not None and longest < config.block_size:
                raise UserError(
                    f"critic {name} reads at most {longest} tokens; expected at least block_size, {config.block_size}"
                )
            check_window(critic, config.block_size, f"critic {name}")
            critics.append(FrozenModel(critic))
    return critics
