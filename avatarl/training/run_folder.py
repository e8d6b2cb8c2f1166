"""Whether a run folder may be written: it is new, or the same run goes on in it."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from avatarl.data import PreparedData
from avatarl.errors import UserError

from .config import TrainConfig


def check_run_folder(run: Path, config: TrainConfig, resume: bool) -> None:
    """Refuse to write over another run, and to resume under other settings.

    Raises:
        UserError: naming the folder or the settings that differ.
    """
    if run.exists() and not run.is_dir():
        raise UserError(f"out is {run}, which is a file; expected a folder that does not exist yet")
    if not run.exists() or not any(run.iterdir()):
        return
    if not resume:
        raise UserError(f"out is {run}, which already holds files; give another folder, or --resume to continue a run")
    if not (run / "config.yaml").is_file():
        raise UserError(f"out is {run}, which holds files but no config.yaml; --resume needs a run folder")
    try:
        saved = flatten(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError, AttributeError) as error:
        raise UserError(f"{run / 'config.yaml'} cannot be read; move the folder away to start again") from error
    wanted = flatten(config.as_dict())
    differences = [
        f"{name} was {saved.get(name)!r} and is {wanted.get(name)!r}"
        for name in sorted(set(saved) | set(wanted))
        if name != "out" and saved.get(name) != wanted.get(name)
    ]
    if differences:
        raise UserError(f"{run} was started under other settings: {'; '.join(differences)}")


def flatten(settings: dict, prefix: str = "") -> dict:
    """Nested settings by their dotted names, as the command line has them."""
    flat = {}
    for name, value in settings.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def check_same_data(run: Path, data: PreparedData) -> None:
    """Refuse to go on with other data than the run was started with.

    Raises:
        UserError: The folder's digest is not the one in environment.json.
    """
    try:
        digest = json.loads((run / "environment.json").read_text(encoding="utf-8"))["data_digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run / 'environment.json'} cannot be read, so the run's data is unknown") from error
    if digest != data.digest:
        raise UserError(f"{data.path} is not the data that {run} was started with; prepared anew? give another out")
