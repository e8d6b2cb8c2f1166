"""One run from its first file to its last: enter the folder, resume or start, train, leave."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from avatarl.console import Console
from avatarl.errors import RunFailed, UserError
from avatarl.lock import RunLock

from .config import TrainConfig, idle_settings

if TYPE_CHECKING:
    from .processes import Processes

# A launcher restarts a run at once; a lock held by a lost machine on a shared disk may take so long to be released.
LOCK_PATIENCE_SECONDS = 60


def train(config: TrainConfig, *, resume: bool = False, allow_changes: bool = False, quiet: bool = False) -> dict:
    """Train a player and leave a run folder; CONTRIBUTING.md says what lies in it.

    Under ``torchrun`` every process calls this, and the first one writes.

    Args:
        config: What to train on what, and how.
        resume: Continue from the newest good checkpoint of ``out``; start if there is none.
        allow_changes: Resume although settings, data or critics have changed.
        quiet: Print nothing.

    Returns:
        The run's summary: steps, tokens, seconds, parameters, FLOPs, the best validation cross-entropy (nats).

    Raises:
        UserError: A setting, the data, a critic or the run folder cannot be used; nothing was written.
        RunFailed: The loss is no longer finite, the run folder cannot be written, or another process is gone.
        RunStopped: SIGTERM or SIGINT; the run is saved.
    """
    from avatarl.run_dir.environment import describe_environment
    from avatarl.run_dir.identity import flatten, has_changed_since, write_finish, write_resume, write_start
    from avatarl.run_dir.log import without_traceback_of_tensorboard
    from avatarl.run_dir.tracker import check_tracker

    from .artifacts import check_players
    from .loop import train_to_end
    from .processes import Processes
    from .resume import check_run_folder, find_checkpoint, load_checkpoint
    from .setup import set_up
    from .state import Progress
    from .stopping import StopRequest

    run, unused_critics = Path(config.out), None
    if config.critic is not None and "critic" in idle_settings(flatten(config.as_dict())):
        unused_critics = ", ".join(config.critics)
        config = dataclasses.replace(config, critic=None, critic_quantization=None, shard_critics=False)
    with (
        without_traceback_of_tensorboard(),
        _failures_in_one_line(run),
        Processes.of_this_run() as processes,
        StopRequest(has_launcher=processes.count > 1) as stop,
    ):
        processes.on_main(lambda: check_run_folder(run, config, resume, allow_changes))
        processes.on_main(lambda: check_tracker(config.tracker))
        setup = set_up(config, processes)
        with _written_by_one_run(run, processes):
            # Again, now that no other process can write it.
            changes = processes.on_main(lambda: check_run_folder(run, config, resume, allow_changes))
            report = Console(stderr=True, quiet=quiet or not processes.is_main, soft_wrap=True, markup=False).print
            if unused_critics:
                report(f"critic is {unused_critics}; objective {config.objective!r} uses none, so the run has none")
            checkpoint, progress = None, Progress()
            if resume:
                checkpoint, changes = processes.on_main(
                    lambda: find_checkpoint(run, setup.identity, changes, allow_changes, report)
                )
            if checkpoint:
                is_same_run = not changes and not processes.on_main(lambda: has_changed_since(run, checkpoint))
                progress = processes.broadcast(load_checkpoint(checkpoint, setup, is_same_run))
            for critic in setup.critics:
                progress.cache_flops |= critic.costs
            if processes.is_main and progress.step < setup.total_steps:
                environment = describe_environment(setup.device, setup.precision, processes.count, setup.identity)
                environment["sizes"] = setup.sizes(progress)
                for change in changes:
                    report(f"allowed: {change}")
                if checkpoint:
                    write_resume(run, config.as_dict(), environment, progress.step, changes)
                else:
                    write_start(run, config.as_dict(), environment)
            train_to_end(setup, progress, stop, quiet)
            check_players(setup, progress)
            if processes.is_main:
                write_finish(run)
    return {
        "objective": config.objective,
        "steps": setup.total_steps,
        "seconds": progress.seconds,
        "best_cross_entropy": progress.best_cross_entropy,
        "best_step": progress.best_step,
        **setup.sizes(progress),
    }


@contextlib.contextmanager
def _written_by_one_run(run: Path, processes: Processes) -> Iterator[None]:
    """Make the folder, lock it, and finish what a killed process left undone in it."""
    from avatarl.run_dir.identity import finish_what_was_begun

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
    """Turn errors of a disk, or of another process that is gone, into one line."""
    from safetensors import SafetensorError

    from .processes import is_lost_process

    advice = "--resume continues from the newest good checkpoint"
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise RunFailed(f"{run} cannot be written or read ({reason}); {advice}") from error
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        reason = " ".join(str(error).split())
        raise RunFailed(f"another process of the run no longer answers ({reason}); {advice}") from error
