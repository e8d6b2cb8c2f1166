"""What a run is made of, before its first step: data, player, critics, objective, optimisers, where they compute."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from avatarl.data import PreparedData, Windows
from avatarl.device import pick_device, pick_precision
from avatarl.errors import UserError
from avatarl.models import Critic, build_player, count_parameters, open_critic, training_flops_per_token
from avatarl.models.counting import ParameterCount
from avatarl.models.critics import LiveCritic, Snapshot
from avatarl.models.digest import digest_of_tokenizer
from avatarl.objective import make_objective
from avatarl.objective.engine import is_compiled
from avatarl.places import kept
from avatarl.run_dir.identity import MUON, settings_digest

from .batches import Batches
from .config import TrainConfig
from .guard import Guard
from .model import PlayerWithLoss
from .optim import Optimisers, build_optimisers, muon_precision
from .processes import Processes
from .schedule import Schedules, Stage
from .state import Progress
from .validation import Validation


@dataclass
class Setup:
    """The parts of one run on one process."""

    config: TrainConfig
    processes: Processes
    device: torch.device
    precision: str  # bf16 or fp32
    autocast: AbstractContextManager
    identity: dict[str, str]
    # Data:
    data: PreparedData
    tokenizer: PreTrainedTokenizerBase
    batches: Batches
    validation: Validation
    windows_per_step: int
    tokens_per_step: int
    positions_per_process: int  # of a step; every position of a window counts
    total_steps: int
    # Objective and critics:
    schedules: Schedules
    critics: list[Critic]
    averages: list[Critic]  # those that follow the player
    snapshot: Snapshot | None  # the earlier player that ``ppo`` draws its actions from
    saved_critics: dict[str, LiveCritic]  # those whose weights checkpoints hold, by the names of their files
    # Player:
    player: PreTrainedModel
    player_flops: int  # of a forward and a backward pass, per token
    parameters: ParameterCount
    model: PlayerWithLoss
    step_model: nn.Module  # the same, compiled and wrapped as the config says
    optimisers: Optimisers
    guard: Guard

    def resume_from(self, progress: Progress) -> None:
        """Set the number of steps, since ``epochs`` count what was read, perhaps with other settings.

        Raises:
            UserError: A schedule ends after the run.
        """
        self.total_steps = self.config.total_steps(len(self.batches.windows), progress.step, progress.windows)
        self.schedules = self.schedules.over(self.total_steps)
        self.optimisers.total_steps = self.total_steps

    def start_stage(self, step: int) -> Stage:
        """Give the model the objective of ``step``; free critics that are never active again."""
        stage = self.schedules.stage(step)
        self.model.objective = stage.objective
        if step > self.schedules.last_critic_step:
            for critic in self.critics:
                critic.release()
        return stage

    def check_files(self) -> None:
        """Check that data and caches are unchanged since the start.

        Raises:
            RunFailed: A file has changed; it is named.
        """
        for opened in (self.data, *self.critics):
            opened.check()

    @property
    def unique_tokens(self) -> int:
        """Tokens of an epoch."""
        return len(self.batches.windows) * self.config.block_size

    def sizes(self, progress: Progress) -> dict[str, int]:
        """Parameters of the player; tokens and FLOPs of the whole run, evaluations aside.

        ``unique_tokens`` are those of an epoch. ``cached_critic_flops`` were spent elsewhere: on critics' passes over
        the training windows of their caches.
        """
        remaining = (self.total_steps - progress.step) * self.tokens_per_step
        critic_flops = sum(
            self.schedules.active_steps(critic, progress.step) * self.tokens_per_step * critic.flops_per_token
            for critic in self.critics
        )
        return {
            "parameters": self.parameters.total,
            "non_embedding_parameters": self.parameters.non_embedding,
            "unique_tokens": self.unique_tokens,
            "tokens": progress.tokens + remaining,
            "player_flops": progress.player_flops + remaining * self.player_flops,
            "critic_flops": progress.critic_flops + critic_flops,
            "cached_critic_flops": sum(progress.cache_flops.values()),
        }

    def describe(self, progress: Progress) -> str:
        """One line that says what is trained on what."""
        tokens = self.sizes(progress)["tokens"]
        several = f", {self.processes.count} processes ({self.config.parallel})" if self.processes.count > 1 else ""
        return (
            f"{self.config.objective}: {self.parameters.total:,} parameters "
            f"({self.parameters.non_embedding:,} outside the embedding), {self.total_steps:,} steps, "
            f"{tokens:,} tokens ({tokens / self.unique_tokens:.2f} epochs), {self.device} {self.precision}{several}"
        )


def set_up(config: TrainConfig, processes: Processes) -> Setup:
    """Open and build everything; nothing is written.

    Raises:
        UserError: A setting, the data or a critic cannot be used.
    """
    data = processes.main_first(lambda verified: PreparedData.open(config.data, verified=verified))
    tokenizer = data.load_tokenizer()
    windows = Windows(data.train, config.block_size, config.train_windows)
    valid_windows = Windows(data.valid, config.block_size)
    total_steps = config.total_steps(len(windows))
    config.windows_per_process(processes.count)  # refuses what cannot be shared

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
            after_main=processes.main_first,
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
    identity = processes.on_main(lambda: identity_of_run(config, precision, data, critics))
    if config.optim.name == "muon":
        identity[MUON] = muon_precision(device)

    snapshot = Snapshot("snapshot", new_player()) if objective.needs_snapshot else None
    frozen = [*critics, *([snapshot] if snapshot else [])]
    model = PlayerWithLoss(player, objective, len(tokenizer), is_compiled(loss_impl))
    if config.parallel == "fsdp" and processes.count > 1:
        for critic in frozen:
            critic.shard(partial(processes.shard, device=device, keep_root=True), config.shard_critics)
        processes.shard(model, player, device)
    if config.compile:
        for critic in frozen:
            critic.compile()
    step_model = torch.compile(model) if config.compile else model
    averages = [critic for critic in critics if critic.keeps_state]
    saved = {f"average{number}": critic for number, critic in enumerate(averages)}
    saved |= {"snapshot": snapshot} if snapshot else {}
    tokens_per_step = config.windows_per_step * config.block_size
    return Setup(
        config=config,
        processes=processes,
        device=device,
        precision=precision,
        autocast=torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext(),
        identity=identity,
        data=data,
        tokenizer=tokenizer,
        batches=Batches(windows, config, processes, device),
        validation=Validation(valid_windows, config, device, processes),
        windows_per_step=config.windows_per_step,
        tokens_per_step=tokens_per_step,
        positions_per_process=tokens_per_step // processes.count,
        total_steps=total_steps,
        schedules=schedules,
        critics=critics,
        averages=averages,
        snapshot=snapshot,
        saved_critics=saved,
        player=player,
        player_flops=player_flops,
        parameters=parameters,
        model=model,
        step_model=processes.wrap(step_model, config.parallel, device),
        optimisers=build_optimisers(player, config.optim, total_steps),
        guard=Guard(config.guard, device),
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
