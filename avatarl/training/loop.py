"""The training loop, the same for every objective and for one process or many.

The order of batches depends on the seed alone; the loss is divided by the positions of the whole optimiser step;
metrics stay on the device until a line is logged. A checkpoint is written between two steps, and holds all that the
next step depends on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from pathlib import Path

import numpy as np
import torch

from avatarl.errors import RunFailed, RunStopped
from avatarl.places import CONFIG
from avatarl.run_dir.checkpoint import Checkpoints
from avatarl.run_dir.log import RunLog

from .artifacts import save_failed_evaluation, save_skipped_windows, write_player
from .display import Display
from .model import add_metrics
from .optim import clip_gradients
from .processes import sync_gradients
from .schedule import Stage
from .setup import Setup
from .state import Progress, tensors_of_run
from .stopping import StopRequest


def train_step(setup: Setup, stage: Stage, progress: Progress) -> float:
    """Take one optimiser step; return its learning rate."""
    config, processes, model, step = setup.config, setup.processes, setup.model, progress.step + 1
    if setup.snapshot and (step - 1) % config.baseline.ppo_refresh_every == 0:
        setup.snapshot.refresh(setup.player)
    scheduled = None if setup.schedules.are_constant else setup.schedules.values(step)

    # Forward and backward over the micro-batches.
    model.train()
    seed_dropout(config.seed, step, processes.rank)
    metrics = {}
    batches = setup.batches.of_step(progress.windows, stage.objective.num_uniforms)
    for number, batch in enumerate(batches, start=1):
        with sync_gradients(setup.step_model, is_last=number == setup.batches.num_passes):
            with setup.autocast:
                answers = [critic.answers(batch) for critic in stage.critics]
                earlier = setup.snapshot.answers(batch) if setup.snapshot else None
                loss, values = setup.step_model(
                    batch.inputs,
                    batch.targets,
                    answers,
                    num_valid=setup.positions_per_process,
                    uniforms=batch.uniforms,
                    scheduled=scheduled,
                    snapshot=earlier,
                )
            loss.backward()
        add_metrics(metrics, values)

    # Clip, decide whether to skip, update.
    grad_norm = clip_gradients(setup.player.parameters(), config.optim.clip_norm, processes)
    skipped = setup.guard.check(step, processes.mean(metrics["loss"]), grad_norm)
    if step in setup.schedules.turning_steps:
        setup.guard.forget_losses()
    learning_rate = setup.optimisers.step(step, skipped)
    for average in setup.averages:
        average.update(setup.player, step)

    # Count.
    add_metrics(progress.sums, {**metrics, "grad_norm": grad_norm, "taken": torch.ones_like(grad_norm)}, skipped)
    progress.step = step
    progress.windows += setup.windows_per_step
    progress.tokens += setup.tokens_per_step
    progress.player_flops += setup.tokens_per_step * setup.player_flops
    progress.critic_flops += setup.tokens_per_step * sum(critic.flops_per_token for critic in stage.critics)
    return learning_rate


def train_to_end(setup: Setup, progress: Progress, stop: StopRequest, quiet: bool) -> None:
    """Take the steps from ``progress`` to the end of the run.

    Raises:
        RunFailed: The loss is no longer finite, or files cannot be written.
        RunStopped: A signal came; the run is saved.
    """
    config, processes, guard, run = setup.config, setup.processes, setup.guard, Path(setup.config.out)
    is_main, total_steps = processes.is_main, setup.total_steps
    with (
        Display(run.name, total_steps, progress.step, quiet or not is_main) as display,
        open_log(setup, progress, display) if is_main else contextlib.nullcontext() as log,
        Checkpoints(
            run, setup.identity, processes, config.keep_last, config.keep_every, config.checkpoint_in_background
        ) as checkpoints,
    ):
        display.say(setup.describe(progress))
        if progress.step == total_steps:
            display.say(f"{run} is finished; checking its players")
        elif progress.step:
            display.say(f"{run} resumes after step {progress.step}")
        stop.is_seen_by_loop = True
        signum = processes.largest(stop.signum)
        for critic in setup.saved_critics.values():
            critic.start(setup.player, progress.step)
        stage = None
        clock = time.monotonic() - progress.unlogged_seconds  # when the steps since the last line began, but for pauses
        while progress.step < total_steps and not signum:
            if stage is None or progress.step == stage.last_step:
                stage = setup.start_stage(progress.step + 1)
            learning_rate = train_step(setup, stage, progress)
            step, is_last = progress.step, progress.step == total_steps
            is_checkpoint = step % config.checkpoint_every_steps == 0

            # Once in a while: a line of metrics, also at the end of a stage, since a line averages steps of one kind.
            is_line = step % config.log_every_steps == 0 or step == stage.last_step
            if is_line:
                log_metrics(setup, progress, learning_rate, clock, log, display)
                clock = time.monotonic()
            # On a GPU this waits for the device, which a line of metrics and a checkpoint do anyway.
            if (setup.device.type == "cpu" or is_line or is_checkpoint) and guard.must_stop:
                raise RunFailed(save_skipped_windows(setup, progress))

            # Once in a while: an evaluation.
            paused = time.monotonic()  # speed is that of training alone
            progress.unlogged_seconds = paused - clock
            if step % config.eval_every_steps == 0 or is_last:
                evaluate(setup, stage, progress, log, display)

            # Once in a while: a checkpoint, also at the end and where the run is asked to stop.
            signum = processes.largest(stop.signum)
            if is_checkpoint or is_last or signum:
                save_checkpoint(setup, progress, checkpoints, log, display, waits=bool(signum) or is_last)
            clock += time.monotonic() - paused

    if progress.step < total_steps:
        raise RunStopped(
            signum,
            f"{run} stopped after step {progress.step} of {total_steps}; "
            f"to resume: avatarl train --config {run / CONFIG} --resume",
        )


def log_metrics(
    setup: Setup, progress: Progress, learning_rate: float, clock: float, log: RunLog | None, display: Display
) -> None:
    """Write a line of metrics, averages over the updates since the last line."""
    means = setup.processes.means(progress.sums)  # waits for the device
    taken = means.pop("taken")
    seconds = time.monotonic() - clock
    tokens_per_second = (progress.tokens - progress.logged_tokens) / seconds
    display.show_step(progress.step, tokens_per_second)
    if log:
        values = {
            **progress.spent,
            "learning_rate": learning_rate,
            **setup.schedules.logged(progress.step),
            "tokens_per_second": tokens_per_second,
            "skipped_steps": setup.guard.num_skipped,
            **({name: value / taken for name, value in means.items()} if taken else {}),
        }
        log.write("train", progress.step, values)
    progress.seconds += seconds
    progress.logged_tokens, progress.sums = progress.tokens, {}


def evaluate(setup: Setup, stage: Stage, progress: Progress, log: RunLog | None, display: Display) -> None:
    """Evaluate the player, and write it as a model folder if it is the best so far."""
    scheduled = setup.schedules.values(progress.step)
    values = setup.validation.evaluate(setup.model, stage.critics, setup.snapshot, scheduled, setup.autocast)
    cross_entropy = values["cross_entropy"]
    if not math.isfinite(cross_entropy):
        raise RunFailed(save_failed_evaluation(setup, progress.step, values))
    if log:
        log.write("eval", progress.step, {**progress.spent, **values})
    display.say(f"step {progress.step}: validation cross-entropy {cross_entropy:.4f} nats")
    progress.cross_entropy = cross_entropy
    if cross_entropy < progress.best_cross_entropy:
        progress.best_cross_entropy, progress.best_step = cross_entropy, progress.step
        progress.best_player = write_player(setup, progress, "player")


def save_checkpoint(
    setup: Setup, progress: Progress, checkpoints: Checkpoints, log: RunLog | None, display: Display, waits: bool
) -> None:
    """Write all that the next step depends on; ``waits`` until it is written, also in the background."""
    setup.processes.on_main(setup.check_files)
    progress.sums = setup.processes.means(progress.sums)
    if log:
        log.flush()
    state = {**dataclasses.asdict(progress), "guard": setup.guard.state_dict()}
    tensors = tensors_of_run(setup.player, setup.optimisers, setup.saved_critics)
    if not checkpoints.save(progress.step, tensors, state, is_last=waits):
        display.say(f"step {progress.step}: no checkpoint, since the previous one is still being written")


def open_log(setup: Setup, progress: Progress, display: Display) -> RunLog:
    """The log of the process that writes; a finished run adds nothing to events and tracker."""
    config, is_running = setup.config, progress.step < setup.total_steps
    return RunLog(
        Path(config.out),
        progress.step,
        display.say,
        tensorboard=config.tensorboard and is_running,
        tracker=config.tracker if is_running else None,
        settings=config.as_dict(),
    )


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Set torch's generators for one optimiser step of one process.

    Only dropout uses them in training, so that it depends on nothing that was drawn before.
    """
    (state,) = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(state >> np.uint64(1)))
