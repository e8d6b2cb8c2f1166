"""Find the files that a run or a comparison names, wherever its folder lies now.

A configuration holds absolute paths, its own folder's as ``out``, and ids of the Hub as given. The folder that the
configuration lies in is the run. A path in it is first looked for at its place relative to ``out``, so that a tree can
be moved or copied as a whole, and then as it is written, so that a run can be moved alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .errors import UserError
from .untrusted import read_json, read_yaml

CONFIG, ENVIRONMENT, METRICS, COMPARISON = "config.yaml", "environment.json", "metrics.jsonl", "comparison.yaml"
PATHS = ("data", "critic", "pairs")  # settings, also within groups, that may name files


def kept(settings: Mapping[str, Any], names: Iterable[str] = ()) -> dict[str, Any]:
    """Return settings with absolute paths, for a configuration; ``names`` are not paths, whatever lies there."""

    def absolute(_setting: str, name: str) -> str:
        return os.path.abspath(name) if os.path.exists(name) and name not in names else name

    return {**_changed(settings, absolute), "out": os.path.abspath(settings["out"])}


def located(settings: Mapping[str, Any], folder: str | Path) -> dict[str, Any]:
    """Return settings that lie in ``folder`` with paths as they are now; a missing one stays as written."""

    def place(_setting: str, name: str) -> str:
        return next(filter(os.path.exists, looked_for(name, settings, folder)), name)

    return _changed(settings, place) | ({"out": str(folder)} if "out" in settings else {})


def looked_for(name: str, settings: Mapping[str, Any], folder: str | Path) -> list[str]:
    """List the places where a path in a configuration in ``folder`` may be, the likeliest first."""
    out = settings.get("out")
    if not isinstance(out, str) or os.path.isabs(name) != os.path.isabs(out):
        return [name]
    return list(dict.fromkeys([os.path.normpath(os.path.join(folder, os.path.relpath(name, out))), name]))


def may_be_same(was: str | list[str] | None, now: str | list[str] | None) -> bool:
    """Whether paths lead to the same folders, or the old ones are gone and the new ones exist."""
    was, now = ([each] if isinstance(each, str) else each or [] for each in (was, now))

    def may_be(one: str, other: str) -> bool:
        if one == other or not os.path.exists(other):
            return one == other
        is_gone = os.path.isabs(one) and not os.path.exists(one)
        return is_gone or os.path.realpath(one) == os.path.realpath(other)

    return len(was) == len(now) and all(map(may_be, was, now))


def owner(recipe: str | Path) -> Path | None:
    """Return the run or comparison that a configuration belongs to, known by the files beside it; None for a recipe."""
    folder = Path(recipe).parent
    if Path(recipe).name == COMPARISON:  # a comparison writes a recipe for each of its runs
        kinds = ("runs", "critics", "tuning")
        return folder if any(any((folder / "recipes").glob(f"{kind}-*.yaml")) for kind in kinds) else None
    try:
        record = read_json(folder / ENVIRONMENT)
    except (OSError, ValueError):
        return None
    return folder if isinstance(record, dict) and "identity" in record else None


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Read settings from a YAML file; paths of a run or comparison are as they are now.

    Raises:
        UserError: There is no such file, or it holds no settings by name.
    """
    settings, folder = read_settings(path), owner(path)
    return settings if folder is None else located(settings, folder)


def read_settings(path: str | Path) -> dict[str, Any]:
    """Read settings from a YAML file as they are written.

    Raises:
        UserError: There is no such file, or it holds no settings by name.
    """
    settings = read_yaml(path)
    if not isinstance(settings, dict):
        raise UserError(f"config {path} holds {settings!r}; expected settings by name, as in a recipe or a run")
    return settings


def require_found(config: str | Path, wanted: Mapping[str, Any]) -> None:
    """Refuse ``wanted`` settings whose paths come from a run's or comparison's configuration and are missing.

    Raises:
        UserError: naming the setting and every place where it was looked for.
    """
    written, names = read_settings(config), [name for _, name in _paths(wanted)]
    for setting, name in _paths(written):
        places = looked_for(name, written, Path(config).parent)
        # A relative name of a critic may be an id of the Hub.
        if name in names and (setting != "critic" or os.path.isabs(name)) and not any(map(os.path.exists, places)):
            missing = {"data": "/manifest.json: no such file", "critic": ": no such folder", "pairs": ": no such file"}
            raise UserError(
                f"{name}{missing[setting]}; it is {setting} of {config}, looked for at {' and at '.join(places)}; "
                f"give another {setting}"
            )


def _paths(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List each setting that may name files, with its name."""
    found = []
    _changed(settings, lambda setting, name: found.append((setting, name)) or name)
    return found


def _changed(settings: Mapping[str, Any], change: Callable[[str, str], str]) -> dict[str, Any]:
    """Return settings with each path changed."""

    def of(setting: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: of(name, each) for name, each in value.items()}
        if setting in PATHS and isinstance(value, list):
            return [of(setting, each) for each in value]
        return change(setting, value) if setting in PATHS and isinstance(value, str) else value

    return {setting: of(setting, value) for setting, value in settings.items()}
