"""The training loop, the same for every objective.

Batches come in an order that depends on the seed and the step alone; the loss is normalised by the positions of the
whole optimiser step; metrics stay on the device until a line is logged.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_model as save_weights
from torch import Tensor
from transformers import PreTrainedModel

from avatarl.data import PreparedData, WindowOrder, Windows
from avatarl.errors import UserError
from avatarl.models import build_player, count_parameters, load_critic, training_flops_per_token
from avatarl.models.counting import forward_flops_per_token
from avatarl.models.loading import longest_sequence
from avatarl.objective import make_objective
from avatarl.objective.fused.implementations import check_implementation

from .checkpoint import newest_good_checkpoint, save_checkpoint
from .config import TrainConfig
from .device import pick_device, pick_precision
from .draws import uniform_draws
from .model_card import write_model_folder
from .optim import Optimisers, build_optimisers
from .rewarded_player import RewardedPlayer
from .run_folder import check_run_folder, check_same_data
from .runlog import MetricSums, RunLog, describe_environment
from .validation import Validation


class RunFailed(RuntimeError):
    """The run itself went wrong, not the user's settings; the command line exits with status 1."""


def train(config: TrainConfig, resume: bool = False, quiet: bool = False) -> dict:
    """Train a player and leave a run folder; CONTRIBUTING.md says what lies in it.

    Args:
        config: What to train on what, and how.
        resume: Continue from the newest good checkpoint of ``config.out``; start where there is none.
        quiet: Print nothing.

    Returns:
        The run's summary: steps, tokens, seconds, parameters, FLOPs, the best validation cross-entropy (nats).

    Raises:
        UserError: A setting, the data, a critic or the run folder cannot be used; nothing was written.
        RunFailed: The loss is no longer a number.
    """
    # --- what there is -------------------------------------------------------------------------------------------
    run = Path(config.out)
    check_run_folder(run, config, resume)
    data = PreparedData.open(config.data)
    tokenizer = data.load_tokenizer()
    train_windows, valid_windows = Windows(data.train, config.block), Windows(data.valid, config.block)
    order = WindowOrder(len(train_windows), config.seed)
    total_steps = config.total_steps(len(train_windows))

    device = pick_device(config.device)
    precision = pick_precision(config.precision, device)
    autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
    critic_dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    objective = make_objective(config.objective, config.avatarl, config.baseline)
    critic_names = config.critics if objective.needs_critic else []
    if objective.needs_critic and not critic_names:
        raise UserError(f"objective {config.objective!r} needs a critic, and critic is empty; give a run or a model")
    critics = [load_critic(name, tokenizer, critic_dtype, device) for name in critic_names]
    for name, critic in zip(critic_names, critics, strict=True):
        longest = longest_sequence(critic)
        if longest is not None and longest < config.block:
            raise UserError(f"critic {name} reads at most {longest} tokens; expected at least block, {config.block}")
    loss_impl = "compiled" if config.loss_impl == "auto" and config.compile else config.loss_impl
    try:
        objective.check_settings(len(tokenizer), len(critics))
        check_implementation(loss_impl, device.type)
    except ValueError as error:
        raise UserError(str(error)) from error

    player = build_player(config.player, tokenizer, config.block, config.seed).to(device)
    model = RewardedPlayer(player, objective, critics, vocab_size=len(tokenizer), loss_impl=loss_impl)
    step_model = torch.compile(model) if config.compile else model
    optimisers = build_optimisers(player, config.optim, total_steps)
    torch.manual_seed(config.seed)  # from here on dropout is the only user of the global generator

    # --- where we are --------------------------------------------------------------------------------------------
    progress = {"step": 0, "best_cross_entropy": math.inf, "best_step": None, "seconds": 0.0}
    progress |= {"cross_entropy": math.nan, "unlogged": {"since_step": 0, "seconds": 0.0, "sums": {}}}
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out is {run}, which cannot be made ({error.strerror}); expected a writable place") from error
    report = Console(stderr=True, quiet=quiet, soft_wrap=True, markup=False).print
    checkpoint = newest_good_checkpoint(run, report) if resume else None
    if checkpoint:
        check_same_data(run, data)
        progress = load_checkpoint(checkpoint, model, optimisers)
    else:
        config.save(run / "config.yaml")
        environment = describe_environment(device, precision, data.digest)
        (run / "environment.json").write_text(json.dumps(environment, indent=1), encoding="utf-8")

    def batches(step: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Inputs, targets and draws of one optimiser step, a micro-batch at a time."""
        for micro in range(config.accumulate_steps):
            position = step * config.windows_per_step + micro * config.batch_windows
            inputs, targets = train_windows.batch(order.indices(position, config.batch_windows))
            positions_of_windows = range(position, position + config.batch_windows)
            draws = uniform_draws(config.seed, positions_of_windows, config.block, objective.num_draws)
            yield tuple(None if x is None else x.to(device, non_blocking=True) for x in (inputs, targets, draws))

    validation = Validation(valid_windows, config, device)

    def write_player(name: str, step: int) -> None:
        """The player as it is after ``step`` and its evaluation, as a model folder of the run."""
        write_model_folder(run / name, player, tokenizer, config, critic_names, step, progress["cross_entropy"])

    # --- the loop ------------------------------------------------------------------------------------------------
    is_finished = progress["step"] == total_steps
    with RunLog(run, total_steps, progress["step"], config.tensorboard and not is_finished, quiet) as log:
        log.say(describe(player, data, config, total_steps, device, precision))
        unlogged = progress["unlogged"]
        since_log, logged_at = MetricSums(unlogged["sums"]), unlogged["since_step"]
        clock = time.monotonic() - unlogged["seconds"]
        for step in range(progress["step"] + 1, total_steps + 1):
            if model.objective.needs_snapshot and (step - 1) % config.baseline.ppo_refresh_every == 0:
                model.refresh_snapshot()

            player.train()
            # Every position of a window counts; M is known before the first forward pass.
            num_valid = config.windows_per_step * config.block
            for inputs, targets, draws in batches(step - 1):
                with autocast:
                    loss, metrics = step_model(inputs, targets, num_valid, draws)
                loss.backward()
                since_log.add(metrics)
            clip_norm = math.inf if config.optim.clip_norm is None else config.optim.clip_norm
            since_log.add({"grad_norm": torch.nn.utils.clip_grad_norm_(player.parameters(), clip_norm)})
            learning_rate = optimisers.learning_rate
            optimisers.step()

            # Once in a while.
            if step % config.log_every_steps == 0 or step == total_steps:
                values = since_log.means(step - logged_at)
                seconds = time.monotonic() - clock
                progress["seconds"] += seconds
                tokens_per_step = config.windows_per_step * config.block
                log.write(
                    "train",
                    step,
                    {
                        "tokens": step * tokens_per_step,
                        "learning_rate": learning_rate,
                        "tokens_per_second": (step - logged_at) * tokens_per_step / seconds,
                        **values,
                    },
                )
                check_finite(values, step)
                since_log, logged_at, clock = MetricSums(), step, time.monotonic()

            started = time.monotonic()
            if step % config.eval_every_steps == 0 or step == total_steps:
                values = validation.evaluate(model, autocast)
                log.write("eval", step, {"tokens": step * config.windows_per_step * config.block, **values})
                progress["cross_entropy"] = values["cross_entropy"]
                if values["cross_entropy"] < progress["best_cross_entropy"]:
                    progress |= {"best_cross_entropy": values["cross_entropy"], "best_step": step}
                    write_player("player", step)
            progress["step"] = step
            if step % config.checkpoint_every_steps == 0 or step == total_steps:
                sums = since_log.means(1)
                check_finite(sums, step)  # a checkpoint is something to go on from
                progress["unlogged"] = {"since_step": logged_at, "seconds": started - clock, "sums": sums}
                write = checkpoint_writer(model, optimisers, progress)
                save_checkpoint(run, step, write, config.keep_checkpoints)
            clock += time.monotonic() - started  # speed is that of training alone

        if not (run / "final" / "config.json").exists():
            write_player("final", total_steps)

    tokens = total_steps * config.windows_per_step * config.block
    critic_flops = sum(forward_flops_per_token(critic, config.block) for critic in critics)
    return {
        "objective": config.objective,
        "steps": total_steps,
        "tokens": tokens,
        "seconds": progress["seconds"],
        "parameters": count_parameters(player).total,
        "non_embedding_parameters": count_parameters(player).non_embedding,
        "player_flops": tokens * training_flops_per_token(player, config.block),
        "critic_flops": tokens * critic_flops,
        "best_cross_entropy": progress["best_cross_entropy"],
        "best_step": progress["best_step"],
    }


def check_finite(values: dict[str, float], step: int) -> None:
    """Stop where the loss or its gradient is no longer a number.

    Raises:
        RunFailed: naming the one and the step.
    """
    for name in ("loss", "grad_norm"):
        if not math.isfinite(values.get(name, 0.0)):
            raise RunFailed(f"{name} is {values[name]} at step {step}; try a smaller optim.learning_rate")


def checkpoint_writer(model: RewardedPlayer, optimisers: Optimisers, progress: dict) -> Callable[[Path], None]:
    """A function that writes everything needed to go on exactly from here into a folder."""

    def write(folder: Path) -> None:
        save_weights(model.player, str(folder / "player.safetensors"))
        if model.snapshot is not None:
            save_weights(model.snapshot, str(folder / "snapshot.safetensors"))
        random_state = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random_state["cuda"] = torch.cuda.get_rng_state()
        torch.save({"optimisers": optimisers.state_dict(), "random": random_state}, folder / "optimiser.pt")
        (folder / "state.json").write_text(json.dumps(progress))

    return write


def load_checkpoint(folder: Path, model: RewardedPlayer, optimisers: Optimisers) -> dict:
    """Put weights, optimisers and random generators back, and return the progress."""
    load_weights(model.player, str(folder / "player.safetensors"))
    if (folder / "snapshot.safetensors").exists():
        model.refresh_snapshot()
        load_weights(model.snapshot, str(folder / "snapshot.safetensors"))
    saved = torch.load(folder / "optimiser.pt", map_location="cpu", weights_only=True)
    optimisers.load_state_dict(saved["optimisers"])
    torch.set_rng_state(saved["random"]["cpu"])
    if "cuda" in saved["random"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["random"]["cuda"])
    return json.loads((folder / "state.json").read_text())


def describe(
    player: PreTrainedModel, data: PreparedData, config: TrainConfig, steps: int, device: torch.device, precision: str
) -> str:
    """One line that says what is being trained on what."""
    count = count_parameters(player)
    tokens = steps * config.windows_per_step * config.block
    return (
        f"{config.objective}: {count.total:,} parameters ({count.non_embedding:,} outside the embedding), "
        f"{steps:,} steps, {tokens:,} tokens ({tokens / len(data.train):.2f} epochs), {device} {precision}"
    )
