"""What a run's folder says about the run besides numbers, and whether a run may write there.

config.yaml holds the settings, environment.json where the run ran and on what; both are there before the first step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from avatarl.durable import own_name, refuse_link, replace_file, tidy
from avatarl.errors import UserError
from avatarl.lock import LOCK
from avatarl.places import CONFIG, ENVIRONMENT, kept
from avatarl.untrusted import check_place, read_json, read_yaml

from .checkpoint import (
    CHECKPOINTS,
    MANIFEST,
    STEP_FOLDER,
    describe,
    is_complete,
    read_manifest,
    step_folder,
    steps_found,
)
from .log import METRICS, TENSORBOARD
from .tracker import RECORD

FINISHED = "finished"  # in environment.json: the checkpoints that were there at the end
MUON = "muon precision"  # in the identity of a run with Muon
# What a start that was killed before it wrote its configuration may have left.
LEFT_BY_A_START = {LOCK, f".{CONFIG}.partial"}
# What a run writes in its folder; wandb makes a folder of its own there.
FILES = {CONFIG, ENVIRONMENT, METRICS, RECORD, LOCK}
FOLDERS = {CHECKPOINTS, TENSORBOARD, "player", "final", "refused", "wandb"}


def settings_to_resume(run: Path, resume: bool) -> dict[str, Any] | None:
    """The settings of the run that lies in a folder, None where a run starts.

    Raises:
        UserError: The folder holds files and ``resume`` is False, or it holds none of a run, or they were changed.
    """
    check_place(run)
    if run.exists() and not run.is_dir():
        raise UserError(f"out is {run}, which is a file; expected a folder that does not exist yet")
    if not run.exists() or not {path.name for path in run.iterdir()} - LEFT_BY_A_START:
        return None
    if not resume:
        raise UserError(f"out is {run}, which already holds files; give another folder, or --resume to continue a run")
    if not (run / CONFIG).is_file():
        raise UserError(f"out is {run}, which holds files but no {CONFIG}; --resume needs a run folder")
    check_own_names(run)
    try:
        settings = dict(read_yaml(run / CONFIG))
        digest = settings_digest(settings)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{run / CONFIG} cannot be read; move the folder away to start again") from error
    accepted = identities_of_run(run)
    if accepted and digest not in [identity.get("settings") for identity in accepted]:
        raise UserError(
            f"{run / CONFIG} was changed after the run wrote it; restore it, or move the folder away to start again"
        )
    return settings


def check_own_names(run: Path) -> None:
    """Refuse links, and pipes that would block, under the names that a run writes.

    Raises:
        UserError: naming the path.
    """
    for path in run.iterdir():
        name = own_name(path.name)
        if name in FILES | FOLDERS:
            refuse_link(path)
        if path.name in FILES and not path.is_file() or path.name in FOLDERS and not path.is_dir():
            kind = "file" if path.name in FILES else "folder"
            raise UserError(f"{path} is not a {kind}, as a run writes it; move it away")
    for path in (run / CHECKPOINTS).glob("*"):
        if STEP_FOLDER.fullmatch(own_name(path.name)):
            refuse_link(path)


def finish_what_was_begun(run: Path) -> None:
    """Finish or undo what a killed process left half done in a run's folder.

    Raises:
        UserError: A path is a link.
    """
    tidy(run, (FILES | FOLDERS).__contains__)
    tidy(run / CHECKPOINTS, STEP_FOLDER.fullmatch)


def identities_of_run(run: Path) -> list[dict[str, str]]:
    """The run's identity at its start and at each resume, oldest first; empty where it never took a step.

    Raises:
        UserError: environment.json cannot be read.
    """
    try:
        return [dict(start["identity"]) for start in _starts(run)]
    except FileNotFoundError as error:
        if steps_found(run / CHECKPOINTS):
            raise UserError(f"{run / ENVIRONMENT} is missing, so the run's data and critics are unknown") from error
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{run / ENVIRONMENT} cannot be read, so the run's data and critics are unknown") from error


def has_changed_since(run: Path, checkpoint: Path) -> bool:
    """Whether a resume after the start that wrote ``checkpoint`` changed something."""
    starts, identity = _starts(run), read_manifest(checkpoint)["identity"]
    wrote = max(number for number, start in enumerate(starts) if dict(start["identity"]) == identity)
    return any(start.get("changes") for start in starts[wrote + 1 :])


def _starts(run: Path) -> list[dict[str, Any]]:
    """What environment.json says of the run's start and of each resume, oldest first."""
    record = read_json(run / ENVIRONMENT)
    return [record, *record["resumed"]]


def changed_identity(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """How precision, data, tokenizer and critics differ; for settings see :func:`differences`."""
    # A critic may have moved, and its name with it.
    before, now = dict(before), dict(now)
    critics = [[name for name in each if name.startswith("critic ")] for each in (before, now)]
    renamed = dict(zip(*critics, strict=False))
    before = {renamed.get(name, name): digest for name, digest in before.items()}
    names = [name for name in {**before, **now} if name != "settings" and now.get(name) != before.get(name)]
    # Where only one of the two has Muon, the settings differ already.
    names = [name for name in names if name != MUON or None not in (before.get(name), now.get(name))]
    if "precision" in names:  # it decides how critics' weights are held, and so their digests
        names = [name for name in names if not name.startswith("critic ")]
    return [f"{name} was {_short(before.get(name))} and is {_short(now.get(name))}" for name in names]


def settings_digest(settings: Mapping[str, Any]) -> str:
    """SHA-256 of all settings but where the run lies."""
    content = {name: value for name, value in settings.items() if name != "out"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def write_start(run: Path, settings: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
    """Describe a run that starts at step 0."""
    replace_file(run / CONFIG, yaml.safe_dump(kept(settings), sort_keys=False))
    replace_file(run / ENVIRONMENT, json.dumps({**environment, "resumed": []}, indent=1))


def write_resume(
    run: Path, settings: Mapping[str, Any], environment: Mapping[str, Any], step: int, changes: Iterable[str]
) -> None:
    """Add to the description that the run resumed after ``step``, and with which changes."""
    record = read_json(run / ENVIRONMENT)
    record.pop(FINISHED, None)
    record["resumed"].append({"step": step, "changes": list(changes), **environment})
    replace_file(run / ENVIRONMENT, json.dumps(record, indent=1))
    replace_file(run / CONFIG, yaml.safe_dump(kept(settings), sort_keys=False))


def write_finish(run: Path) -> None:
    """Add the SHA-256 of the manifests of the finished run's checkpoints, unless it is there already."""
    record = read_json(run / ENVIRONMENT)
    folder = run / CHECKPOINTS
    checkpoints = [step_folder(folder, step) for step in steps_found(folder)]
    left = {each.name: describe(each / MANIFEST)["sha256"] for each in checkpoints if is_complete(each)}
    if record.get(FINISHED) != left:
        replace_file(run / ENVIRONMENT, json.dumps({**record, FINISHED: left}, indent=1))


def manifests_at_finish(run: Path) -> dict[str, str] | None:
    """What :func:`write_finish` wrote: SHA-256 by checkpoint folder; None for a run that has not finished."""
    try:
        left = read_json(run / ENVIRONMENT).get(FINISHED)
    except FileNotFoundError:
        return None
    return left if isinstance(left, dict) else None


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names, as the command line has them."""
    flat = {}
    for name, value in settings.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """``NAME was OLD and is NEW`` for every setting that differs."""
    return [
        f"{name} was {saved.get(name)!r} and is {wanted.get(name)!r}"
        for name in sorted(set(saved) | set(wanted))
        if saved.get(name) != wanted.get(name)
    ]


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "none"
