"""Whether and where a run resumes: its settings against those of its folder, and the newest good checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from avatarl.errors import UserError
from avatarl.places import located, may_be_same
from avatarl.run_dir.checkpoint import STATE, newest_good_checkpoint, read_manifest
from avatarl.run_dir.identity import (
    changed_identity,
    differences,
    flatten,
    identities_of_run,
    manifests_at_finish,
    settings_to_resume,
)

from .artifacts import describe_folder
from .config import TrainConfig, idle_settings
from .setup import Setup
from .state import Progress, load_tensors

# What reading a forged checkpoint may raise.
INVALID = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, SafetensorError)


def check_run_folder(run: Path, config: TrainConfig, resume: bool, allow_changes: bool = False) -> list[str]:
    """Refuse to overwrite another run, and to resume with other settings; return how the settings differ.

    Raises:
        UserError: naming the folder or the settings that differ.
    """
    saved = settings_to_resume(run, resume)
    if saved is None:
        return []
    # A setting that is new since the run started has its default.
    defaults = flatten(TrainConfig(data="", out="", steps=1).as_dict())
    before, now = {**defaults, **located(flatten(saved), run), "out": config.out}, flatten(config.as_dict())
    # Digests tell whether data and critics that lie elsewhere now are the same.
    before |= {name: now[name] for name in ("data", "critic") if may_be_same(before[name], now[name])}
    idle = idle_settings(before) & idle_settings(now)
    changes = differences(*({name: each[name] for name in each if name not in idle} for each in (before, now)))
    if changes and not allow_changes:
        raise UserError(
            f"{run} was started with other settings: {'; '.join(changes)}. Pass --allow_changes to resume anyway"
        )
    return changes


def find_checkpoint(
    run: Path, identity: dict[str, str], changes: list[str], allow_changes: bool, report: Callable[[str], None]
) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, None for the start, and all that has changed since the run was last started.

    Raises:
        UserError: Something has changed and that is not allowed, or no checkpoint is good.
    """
    accepted = identities_of_run(run)
    checkpoint = newest_good_checkpoint(run, report, accepted, manifests_at_finish(run))
    if accepted:
        changes = changes + changed_identity(accepted[-1], identity)
    if changes and not allow_changes:
        raise UserError(f"{run}: {'; '.join(changes)}. Pass --allow_changes to resume anyway")
    return checkpoint, changes


def load_checkpoint(checkpoint: Path, setup: Setup, is_same_run: bool = True) -> Progress:
    """Restore models, optimisers and guard; return how far the run is.

    If settings, data or critics have changed, losses and metrics of earlier steps are dropped.

    Raises:
        UserError: It is of another model or has more steps than the run, or it is not valid.
    """
    try:
        manifest = read_manifest(checkpoint)
        files = [checkpoint / name for name in manifest["files"]]
        load_tensors(files, setup.player, setup.optimisers, setup.saved_critics)
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        progress = Progress.from_state(state, manifest["step"])
        setup.guard.load_state_dict(state["guard"], is_same_run)
        if not is_same_run:
            progress.sums = {}  # a line of metrics averages steps of one kind
        setup.resume_from(progress)
    except UserError:
        raise
    except INVALID as error:
        raise UserError(f"{checkpoint} is not valid ({type(error).__name__}: {error})") from error
    if progress.step > setup.total_steps:
        raise UserError(f"steps is {setup.total_steps}, but the run has taken {progress.step} already")
    if progress.step < setup.total_steps and progress.best_player:
        is_other_text = manifest["identity"]["data"] != setup.identity["data"]
        if is_other_text or describe_folder(checkpoint.parents[1] / "player") != progress.best_player:
            # It was the best on other text; or a better one was written after the checkpoint, and will be again; or it
            # is damaged. The best of the evaluations to come takes its place.
            progress.best_cross_entropy, progress.best_step, progress.best_player = math.inf, None, None
    return progress
