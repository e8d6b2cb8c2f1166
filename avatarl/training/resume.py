"""Whether and where a run resumes: its settings against those of its folder, and the newest good checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from avatarl.errors import UserError
from avatarl.places import located, may_be_same
from avatarl.run_dir.checkpoint import newest_good_checkpoint
from avatarl.run_dir.identity import (
    changed_identity,
    differences,
    flatten,
    identities_of_run,
    manifests_at_finish,
    settings_to_resume,
)

from .config import TrainConfig, idle_settings


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
