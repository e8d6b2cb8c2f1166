"""The training loop, the same for every objective and for one process or many.

Batches come in an order that depends on the seed and the place in it alone; the loss is normalised by the positions of
the whole optimiser step; metrics stay on the device until a line is logged. A checkpoint is taken between two steps,
and holds all that the next step depends on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError

from avatarl.console import Console
from avatarl.errors import RunFailed, RunStopped, UserError
from avatarl.lock import RunLock
from avatarl.run_dir.checkpoint import STATE, Checkpoints, read_manifest
from avatarl.run_dir.environment import describe_environment
from avatarl.run_dir.identity import (
    CONFIG,
    finish_what_was_begun,
    flatten,
    has_changed_since,
    write_finish,
    write_resume,
    write_start,
)
from avatarl.run_dir.log import RunLog, without_traceback_of_tensorboard
from avatarl.run_dir.tracker import check_tracker

from .artifacts import check_players, describe_folder, leave_evaluation, leave_for_study, write_player
from .config import TrainConfig, idle_settings
from .display import Display
from .draws import seed_dropout
from .guard import Guard
from .metrics import MetricSums
from .optim import clip_gradients
from .processes import Processes, gradients_are_summed_later, lost_another
from .resume import check_run_folder, find_checkpoint
from .setup import Reached, Setup, set_up
from .state import check_state, load_tensors, start_of_run, tensors_of_run
from .stopping import StopRequest

# A launcher starts a run again at once; a lock that a lost machine held on a shared disk may take so long to fall.
LOCK_PATIENCE_SECONDS = 60
# What reading a checkpoint that somebody else wrote may end in.
NOT_OURS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, SafetensorError)


def train(config: TrainConfig, *, resume: bool = False, allow_changes: bool = False, quiet: bool = False) -> dict:
    """Train a player and leave a run folder; CONTRIBUTING.md says what lies in it.

    Under ``torchrun`` every process calls this, and the first one writes.

    Args:
        config: What to train on what, and how.
        resume: Continue from the newest good checkpoint of ``config.out``; start where there is none.
        allow_changes: Resume though settings, data or critics are others than before.
        quiet: Print nothing.

    Returns:
        The run's summary: steps, tokens, seconds, parameters, FLOPs, the best validation cross-entropy (nats).

    Raises:
        UserError: A setting, the data, a critic or the run folder cannot be used; nothing was written.
        RunFailed: The loss is no longer a number, the run folder cannot be written, or another process is gone.
        RunStopped: SIGTERM or SIGINT; what was reached is saved.
    """
    run, unasked = Path(config.out), None
    if config.critic is not None and "critic" in idle_settings(flatten(config.as_dict())):
        unasked = ", ".join(config.critics)
        config = dataclasses.replace(config, critic=None, critic_quantization=None, shard_critics=False)
    with (
        without_traceback_of_tensorboard(),
        _failures_in_one_line(run),
        Processes.of_this_run() as processes,
        StopRequest(has_launcher=processes.count > 1) as stop,
    ):
        processes.ask_main(lambda: check_run_folder(run, config, resume, allow_changes))
        processes.ask_main(lambda: check_tracker(config.tracker))
        parts = set_up(config, processes)
        with _written_by_one_run(run, processes):
            # Once more, now that nobody else can have begun to write it meanwhile.
            changes = processes.ask_main(lambda: check_run_folder(run, config, resume, allow_changes))
            report = Console(stderr=True, quiet=quiet or not processes.is_main, soft_wrap=True, markup=False).print
            if unasked:
                report(f"critic is {unasked}, which objective {config.objective!r} does not ask; the run has none")
            checkpoint, changes = processes.ask_main(
                lambda: (
                    find_checkpoint(run, parts.identity, changes, allow_changes, report) if resume else (None, changes)
                )
            )
            progress, guard = start_of_run(), Guard(config.guard, parts.device)
            if checkpoint:
                is_same_run = not changes and not processes.ask_main(lambda: has_changed_since(run, checkpoint))
                progress = processes.from_main(load_checkpoint(checkpoint, parts, guard, is_same_run))  # one for all
            if processes.is_main and progress["step"] < parts.total_steps:
                environment = describe_environment(parts.device, parts.precision, processes.count, parts.identity)
                environment["sizes"] = parts.sizes
                for change in changes:
                    report(f"allowed: {change}")
                if checkpoint:
                    write_resume(run, config.as_dict(), environment, progress["step"], changes)
                else:
                    write_start(run, config.as_dict(), environment)
            return run_steps(parts, progress, guard, stop, quiet)


def load_checkpoint(checkpoint: Path, parts: Setup, guard: Guard, is_same_run: bool = True) -> dict:
    """Put everything back as it was; return how far the run is.

    Where settings, data or critics are others, losses and metrics of the steps before say nothing about those to come.

    Raises:
        UserError: It is of another model, further than the run is to go, or not what a run writes.
    """
    try:
        manifest = read_manifest(checkpoint)
        files = [checkpoint / name for name in manifest["files"]]
        load_tensors(files, parts.player, parts.optimisers, parts.kept_critics)
        progress = start_of_run() | json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        check_state(progress, manifest["step"])
        guard.load_state_dict(progress.pop("guard"), is_same_run)
        if not is_same_run:
            progress["unlogged"]["sums"] = {}  # a line is of steps of one kind
        taken, best_player = progress["step"], progress["best_player"]
        # A checkpoint of an earlier version does not say; its steps were as those to come.
        reached = progress.pop("reached", None)
        parts.go_on_from(Reached(**reached) if reached else parts.reached_after(taken))
    except UserError:
        raise
    except NOT_OURS as error:
        raise UserError(f"{checkpoint} is not what a run writes ({type(error).__name__}: {error})") from error
    if taken > parts.total_steps:
        raise UserError(f"the run is to take {parts.total_steps} steps; it has taken {taken} already")
    if taken < parts.total_steps and best_player:
        is_other_text = manifest["identity"]["data"] != parts.identity["data"]
        if is_other_text or describe_folder(checkpoint.parents[1] / "player") != best_player:
            # It was the best on other text; or a better one was written after the checkpoint, and will be again; or it
            # is damaged. The best of the evaluations to come takes its place.
            progress |= {"best_cross_entropy": math.inf, "best_step": None, "best_player": None}
    return progress


def run_steps(parts: Setup, progress: dict, guard: Guard, stop: StopRequest, quiet: bool) -> dict:
    """The loop: from ``progress`` to the end of the run, or to where it is stopped; returns the summary."""
    config, processes, player, total_steps = parts.config, parts.processes, parts.player, parts.total_steps
    run = Path(config.out)
    is_finished = progress["step"] == total_steps
    # Every position of a window counts, so M is known before the first forward pass; wrappers average over processes.
    num_valid = parts.tokens_per_step // processes.count
    with (
        Display(run.name, total_steps, progress["step"], quiet or not processes.is_main) as display,
        _open_log(parts, progress["step"], display.say) as log,
        Checkpoints(
            run, parts.identity, processes, config.keep_last, config.keep_every, config.checkpoint_in_background
        ) as checkpoints,
    ):
        display.say(parts.describe())
        if is_finished:
            display.say(f"{run} is finished; looking whether its players are there")
        elif progress["step"]:
            display.say(f"{run} goes on after step {progress['step']}")
        stop.is_seen_by_loop = True
        unlogged = progress["unlogged"]
        since_log, logged_at = MetricSums(unlogged["sums"]), unlogged["since_step"]
        tokens_logged = unlogged.get("since_tokens", parts.spent_until(logged_at)["tokens"])
        clock = time.monotonic() - unlogged["seconds"]
        signum = processes.largest(stop.signum)
        for critic in (*parts.critics, *([parts.snapshot] if parts.snapshot else [])):
            critic.start(player, progress["step"])
        for step in range(progress["step"] + 1, total_steps + 1):
            if signum:
                break
            if parts.objective.needs_snapshot and (step - 1) % config.baseline.ppo_refresh_every == 0:
                parts.snapshot.refresh(player)

            stage = parts.schedules.stage(step)
            parts.model.objective = stage.objective
            if step > parts.schedules.last_critic_step:
                for critic in parts.critics:
                    critic.release()
            scheduled = parts.schedules.values(step)

            parts.model.train()
            seed_dropout(config.seed, step, processes.rank)
            metrics = MetricSums()
            for is_last, batch in with_last(parts.batches(step)):
                with gradients_are_summed_later(parts.step_model, is_last):
                    with parts.autocast:
                        answers = [critic.answers(batch) for critic in stage.critics]
                        earlier = parts.snapshot.answers(batch) if parts.snapshot else None
                        loss, values = parts.step_model(
                            batch.inputs, batch.targets, answers, num_valid, batch.uniforms, scheduled, earlier
                        )
                    loss.backward()
                metrics.add(values)
            grad_norm = clip_gradients(player.parameters(), config.optim.clip_norm, processes)
            refused = guard.judge(step, processes.mean(metrics["loss"]), grad_norm)
            if parts.schedules.turns_after(step):
                guard.forget_losses()
            learning_rate = parts.optimisers.step(step, refused)
            for critic in parts.critics:
                critic.update(player, step)
            since_log.add({**metrics.sums, "grad_norm": grad_norm, "taken": torch.ones_like(grad_norm)}, refused)

            # Once in a while, and where critics come or go: a line is of steps of one kind.
            is_stage_over = step < total_steps and parts.schedules.stage(step + 1) is not stage
            if step % config.log_every_steps == 0 or step == total_steps or is_stage_over:
                values = since_log.over(processes)
                taken = values.pop("taken")
                seconds = time.monotonic() - clock
                progress["seconds"] += seconds
                spent = parts.spent_until(step)
                values = {
                    **spent,
                    "learning_rate": learning_rate,
                    **parts.schedules.logged(step),
                    "tokens_per_second": (spent["tokens"] - tokens_logged) / seconds,
                    "skipped_steps": guard.refused,
                    **({name: value / taken for name, value in values.items()} if taken else {}),
                }
                display.update(step, values["tokens_per_second"])
                if log:
                    log.write("train", step, values)
                since_log, logged_at, tokens_logged = MetricSums(), step, spent["tokens"]
                clock = time.monotonic()
            is_due = step % config.checkpoint_every_steps == 0
            # On a GPU asking waits for the device, as a line of metrics and a checkpoint do anyway.
            if (parts.device.type == "cpu" or logged_at == step or is_due) and guard.must_stop:
                raise RunFailed(leave_for_study(parts, guard))

            started = time.monotonic()
            if step % config.eval_every_steps == 0 or step == total_steps:
                values = parts.validation.evaluate(
                    parts.model, stage.critics, parts.snapshot, scheduled, parts.autocast
                )
                if not math.isfinite(values["cross_entropy"]):
                    raise RunFailed(leave_evaluation(parts, guard, step, values))
                if log:
                    log.write("eval", step, {**parts.spent_until(step), **values})
                display.say(f"step {step}: validation cross-entropy {values['cross_entropy']:.4f} nats")
                progress["cross_entropy"] = values["cross_entropy"]
                if values["cross_entropy"] < progress["best_cross_entropy"]:
                    progress |= {"best_cross_entropy": values["cross_entropy"], "best_step": step}
                    progress["best_player"] = write_player(parts, "player", step, progress["cross_entropy"])
            progress["step"] = step
            signum = processes.largest(stop.signum)
            is_end = bool(signum) or step == total_steps
            if is_due or is_end:
                processes.ask_main(parts.check_files)  # before it is a checkpoint
                sums = since_log.over(processes)
                since_log = MetricSums(sums)
                progress["unlogged"] = {
                    "since_step": logged_at,
                    "since_tokens": tokens_logged,
                    "seconds": started - clock,
                    "sums": sums,
                }
                if log:
                    log.flush()
                reached = dataclasses.asdict(parts.reached_after(step))
                state = {**progress, "reached": reached, "guard": guard.state_dict()}
                if not checkpoints.save(
                    step, tensors_of_run(player, parts.optimisers, parts.kept_critics), state, is_last=is_end
                ):
                    display.say(f"step {step}: the checkpoint before is still being written; this one is left out")
            clock += time.monotonic() - started  # speed is that of training alone

        if signum and progress["step"] < total_steps:
            raise RunStopped(
                signum,
                f"{run} stopped after step {progress['step']} of {total_steps}; "
                f"avatarl train --config {run / CONFIG} --resume goes on",
            )
        check_players(parts, progress)
        if processes.is_main:
            write_finish(run)
    return {
        "objective": config.objective,
        "steps": total_steps,
        "seconds": progress["seconds"],
        "best_cross_entropy": progress["best_cross_entropy"],
        "best_step": progress["best_step"],
        **parts.sizes,
    }


def _open_log(parts: Setup, start_step: int, say: Callable[[str], None]) -> contextlib.AbstractContextManager:
    """The log of the process that writes; a finished run adds nothing to events and tracker."""
    if not parts.processes.is_main:
        return contextlib.nullcontext()
    config, goes_on = parts.config, start_step < parts.total_steps
    return RunLog(
        Path(config.out),
        start_step,
        say,
        config.tensorboard and goes_on,
        config.tracker if goes_on else None,
        config.as_dict(),
    )


def with_last(items: Iterator) -> Iterator[tuple[bool, object]]:
    """Each item, and whether it is the last one."""
    item = next(items)
    for following in items:
        yield False, item
        item = following
    yield True, item


@contextlib.contextmanager
def _written_by_one_run(run: Path, processes: Processes) -> Iterator[None]:
    """Make the folder, lock it, and finish what a process that was killed left undone in it."""
    with contextlib.ExitStack() as stack:
        if processes.is_main:
            try:
                run.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                is_disk = error.errno in (errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT)
                kind = RunFailed if is_disk else UserError
                raise kind(f"out is {run}, which cannot be made ({error.strerror})") from error
            stack.enter_context(RunLock(run, LOCK_PATIENCE_SECONDS if processes.count > 1 else 0))
            finish_what_was_begun(run)
        yield


@contextlib.contextmanager
def _failures_in_one_line(run: Path) -> Iterator[None]:
    """A disk that is full, read-only or gone, or another process that is gone, ends the run in one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunFailed(
            f"{run} cannot be written or read ({' '.join(str(error).split())}); complete checkpoints are untouched, "
            "and --resume goes on from the newest good one"
        ) from error
    except RuntimeError as error:
        if not lost_another(error):
            raise
        raise RunFailed(
            f"another process of the run no longer answers ({' '.join(str(error).split())}); --resume goes on from the "
            "newest good checkpoint"
        ) from error
