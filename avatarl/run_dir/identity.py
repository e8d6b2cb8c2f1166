"""A run's folder: whether it may be written, and what it says about the run besides numbers.

config.yaml says what was asked for, environment.json where it ran and on what; both are there before the first step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from avatarl.data import PreparedData
from avatarl.durable import own_name, refuse_link, replace_file, tidy
from avatarl.errors import UserError
from avatarl.lock import LOCK
from avatarl.models import CriticCache
from avatarl.models.digest import digest_of_model, digest_of_tokenizer
from avatarl.places import CONFIG, ENVIRONMENT, kept, located, may_be_same
from avatarl.training.config import TrainConfig, idle_settings
from avatarl.training.rewarded_player import FrozenModel
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

FINISHED = "finished"  # in environment.json: the checkpoints that were left at the end
MUON = "muon precision"  # in a run's identity where it has Muon
# What a start that was stopped before it wrote its configuration may have left.
LEFT_BY_A_START = {LOCK, f".{CONFIG}.partial"}
# What a run writes in its folder; wandb makes a folder of its own there.
FILES = {CONFIG, ENVIRONMENT, METRICS, RECORD, LOCK}
FOLDERS = {CHECKPOINTS, TENSORBOARD, "player", "final", "refused", "wandb"}


def check_run_folder(run: Path, config: TrainConfig, resume: bool, allow_changes: bool = False) -> list[str]:
    """Refuse to write over another run, and to resume under other settings; return how the settings differ.

    Raises:
        UserError: naming the folder or the settings that differ.
    """
    check_place(run)
    if run.exists() and not run.is_dir():
        raise UserError(f"out is {run}, which is a file; expected a folder that does not exist yet")
    if not run.exists() or not {path.name for path in run.iterdir()} - LEFT_BY_A_START:
        return []
    if not resume:
        raise UserError(f"out is {run}, which already holds files; give another folder, or --resume to continue a run")
    if not (run / CONFIG).is_file():
        raise UserError(f"out is {run}, which holds files but no {CONFIG}; --resume needs a run folder")
    check_own_names(run)
    try:
        saved_settings = read_yaml(run / CONFIG)
        saved = flatten(saved_settings)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{run / CONFIG} cannot be read; move the folder away to start again") from error
    accepted = identities_of_run(run)
    if accepted and settings_digest(saved_settings) not in [identity.get("settings") for identity in accepted]:
        raise UserError(
            f"{run / CONFIG} is not as the run wrote it; put it back, or move the folder away to start again"
        )
    # A setting that a run of an earlier version does not name had the value that is the default now.
    defaults = flatten(TrainConfig(data="", out="", steps=1).as_dict())
    before, now = {**defaults, **located(saved, run), "out": config.out}, flatten(config.as_dict())
    # Whether what lies elsewhere now is the same, digests tell.
    before |= {name: now[name] for name in ("data", "critic") if may_be_same(before[name], now[name])}
    idle = idle_settings(before) & idle_settings(now)
    changes = differences(*({name: each[name] for name in each if name not in idle} for each in (before, now)))
    if changes and not allow_changes:
        raise UserError(f"{run} was started under other settings: {'; '.join(changes)} (--allow_changes goes on)")
    return changes


def check_own_names(run: Path) -> None:
    """Refuse what lies under a name of ours and is not what a run writes: links, and pipes that would be waited for.

    Raises:
        UserError: naming it.
    """
    for path in run.iterdir():
        name = own_name(path.name)
        if name in FILES | FOLDERS:
            refuse_link(path)
        if path.name in FILES and not path.is_file() or path.name in FOLDERS and not path.is_dir():
            kind = "file" if path.name in FILES else "folder"
            raise UserError(f"{path} is no {kind}, as a run writes it; move it away")
    for path in (run / CHECKPOINTS).glob("*"):
        if STEP_FOLDER.fullmatch(own_name(path.name)):
            refuse_link(path)


def finish_what_was_begun(run: Path) -> None:
    """Finish or undo what a process that was killed left half done in a run's folder.

    Raises:
        UserError: As :func:`check_own_names`.
    """
    tidy(run, (FILES | FOLDERS).__contains__)
    tidy(run / CHECKPOINTS, STEP_FOLDER.fullmatch)


def identities_of_run(run: Path) -> list[dict[str, str]]:
    """What the run was started with and each time resumed with, oldest first; empty where it never took a step.

    Raises:
        UserError: The record cannot be read.
    """
    try:
        record = read_json(run / ENVIRONMENT)
        return [dict(start["identity"]) for start in (record, *record["resumed"])]
    except FileNotFoundError as error:
        if steps_found(run / CHECKPOINTS):
            raise UserError(f"{run / ENVIRONMENT} is missing, so the run's data and critics are unknown") from error
        return []
    except KeyError as error:
        raise UserError(
            f"{run} is of an earlier version of avatarl; its players can be used, but it cannot go on"
        ) from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{run / ENVIRONMENT} cannot be read, so the run's data and critics are unknown") from error


def has_changed_since(run: Path, checkpoint: Path) -> bool:
    """Whether a start of the run after the one that wrote ``checkpoint`` has changed something."""
    record = read_json(run / ENVIRONMENT)
    starts, identity = [record, *record["resumed"]], read_manifest(checkpoint)["identity"]
    wrote = max(number for number, start in enumerate(starts) if dict(start["identity"]) == identity)
    return any(start.get("changes") for start in starts[wrote + 1 :])


def changed_identity(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """How precision, data, tokenizer and critics differ; settings have :func:`differences`."""
    # The place of a critic may have changed, and with it its name.
    before, now = dict(before), dict(now)
    critics = [[name for name in each if name.startswith("critic ")] for each in (before, now)]
    renamed = dict(zip(*critics, strict=False))
    before = {renamed.get(name, name): digest for name, digest in before.items()}
    names = [name for name in {**before, **now} if name != "settings" and now.get(name) != before.get(name)]
    # Settings say where a run has Muon, and a run of an earlier version does not say in which precision.
    names = [name for name in names if name != MUON or None not in (before.get(name), now.get(name))]
    if "precision" in names:  # which the weights of critics are held in
        names = [name for name in names if not name.startswith("critic ")]
    return [f"{name} was {_short(before.get(name))} and is {_short(now.get(name))}" for name in names]


def identity_of_run(
    config: TrainConfig, precision: str, data: PreparedData, critics: Mapping[str, FrozenModel | CriticCache]
) -> dict[str, str]:
    """All that decides a run's course: precision, and the SHA-256 of settings, data, tokenizer and each critic."""
    return {
        "settings": settings_digest(kept(config.as_dict())),
        "precision": precision,
        "data": data.digest,
        "tokenizer": digest_of_tokenizer(data),
        **{f"critic {name}": _digest_of_critic(critic) for name, critic in critics.items()},
    }


def _digest_of_critic(critic: FrozenModel | CriticCache) -> str:
    """SHA-256 of all that a critic will say, as far as it is known when the run starts."""
    return critic.digest if isinstance(critic, CriticCache) else digest_of_model(critic.model)


def settings_digest(settings: Mapping[str, Any]) -> str:
    """SHA-256 of all settings but where the run lies."""
    return _digest({name: value for name, value in settings.items() if name != "out"})


def write_start(run: Path, config: TrainConfig, environment: dict) -> None:
    """Describe a run that starts at step 0."""
    replace_file(run / CONFIG, yaml.safe_dump(kept(config.as_dict()), sort_keys=False))
    replace_file(run / ENVIRONMENT, json.dumps({**environment, "resumed": []}, indent=1))


def write_resumption(run: Path, config: TrainConfig, environment: dict, step: int, changes: Iterable[str]) -> None:
    """Add to the description that the run went on from ``step``, and with what changes."""
    record = read_json(run / ENVIRONMENT)
    record.pop(FINISHED, None)
    record["resumed"].append({"step": step, "changes": list(changes), **environment})
    replace_file(run / ENVIRONMENT, json.dumps(record, indent=1))
    replace_file(run / CONFIG, yaml.safe_dump(kept(config.as_dict()), sort_keys=False))


def write_finish(run: Path) -> None:
    """Add to the description which checkpoints the finished run has left, unless that is there already."""
    record = read_json(run / ENVIRONMENT)
    folder = run / CHECKPOINTS
    checkpoints = [step_folder(folder, step) for step in steps_found(folder)]
    left = {each.name: describe(each / MANIFEST)["sha256"] for each in checkpoints if is_complete(each)}
    if record.get(FINISHED) != left:
        replace_file(run / ENVIRONMENT, json.dumps({**record, FINISHED: left}, indent=1))


def left_by_finished_run(run: Path) -> dict[str, str] | None:
    """SHA-256 of the manifests of the checkpoints that the finished run has left, by folder; None before its end."""
    try:
        left = read_json(run / ENVIRONMENT).get(FINISHED)
    except FileNotFoundError:
        return None
    return left if isinstance(left, dict) else None


def flatten(settings: dict, prefix: str = "") -> dict:
    """Nested settings by their dotted names, as the command line has them."""
    flat = {}
    for name, value in settings.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def differences(saved: Mapping, wanted: Mapping) -> list[str]:
    """``NAME was OLD and is NEW`` for every setting that differs."""
    return [
        f"{name} was {saved.get(name)!r} and is {wanted.get(name)!r}"
        for name in sorted(set(saved) | set(wanted))
        if saved.get(name) != wanted.get(name)
    ]


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "none"
