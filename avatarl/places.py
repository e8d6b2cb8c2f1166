"""Where what a run or a comparison names lies, wherever its folder lies now.

Its configuration keeps absolute paths, its own folder among them as ``out``; ids of the Hub stay as they are. The
folder that the configuration lies in is the run. What it names is looked for from there as it lay from ``out``, so that
a tree can be moved or copied as a whole, and then as it is written, so that a run can be moved alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .errors import UserError
from .untrusted import read_json, read_yaml

CONFIG, ENVIRONMENT, METRICS, COMPARISON = "config.yaml", "environment.json", "metrics.jsonl", "comparison.yaml"
PATHS = ("data", "critic", "pairs")  # settings, also of groups, that name files, or may


def kept(settings: Mapping[str, Any], names: Iterable[str] = ()) -> dict[str, Any]:
    """Settings as a configuration keeps them; ``names`` are no paths, whatever lies there."""

    def absolute(_setting: str, name: str) -> str:
        return os.path.abspath(name) if os.path.exists(name) and name not in names else name

    return {**_changed(settings, absolute), "out": os.path.abspath(settings["out"])}


def located(settings: Mapping[str, Any], folder: str | Path) -> dict[str, Any]:
    """What a configuration in ``folder`` says, with paths where they are now; what is not found stays as written."""

    def place(_setting: str, name: str) -> str:
        return next(filter(os.path.exists, looked_for(name, settings, folder)), name)

    return _changed(settings, place) | ({"out": str(folder)} if "out" in settings else {})


def looked_for(name: str, settings: Mapping[str, Any], folder: str | Path) -> list[str]:
    """Where a path that a configuration in ``folder`` names may be, the likeliest first."""
    out = settings.get("out")
    if not isinstance(out, str) or os.path.isabs(name) != os.path.isabs(out):
        return [name]
    # Earlier versions kept both relative to where a command ran, which still says how one lies from the other.
    return list(dict.fromkeys([os.path.normpath(os.path.join(folder, os.path.relpath(name, out))), name]))


def may_be_same(was: str | list[str] | None, now: str | list[str] | None) -> bool:
    """Whether paths lead to the same folders, or led to what is no longer there and lead to what is."""
    was, now = ([each] if isinstance(each, str) else each or [] for each in (was, now))

    def may_be(one: str, other: str) -> bool:
        if one == other or not os.path.exists(other):
            return one == other
        is_gone = os.path.isabs(one) and not os.path.exists(one)
        return is_gone or os.path.realpath(one) == os.path.realpath(other)

    return len(was) == len(now) and all(map(may_be, was, now))


def owner(recipe: str | Path) -> Path | None:
    """The run or comparison that a configuration lies in, known by what lies beside it; None for a recipe."""
    folder = Path(recipe).parent
    if Path(recipe).name == COMPARISON:  # which writes the recipe of each run
        kinds = ("runs", "critics", "tuning")
        return folder if any(any((folder / "recipes").glob(f"{kind}-*.yaml")) for kind in kinds) else None
    try:
        record = read_json(folder / ENVIRONMENT)
    except (OSError, ValueError):
        return None
    return folder if isinstance(record, dict) and "identity" in record else None


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The settings of a YAML file by name; those of a run or comparison with paths where they are now.

    Raises:
        UserError: There is no such file, or it holds no settings by name.
    """
    settings, folder = read_settings(path), owner(path)
    return settings if folder is None else located(settings, folder)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings of a YAML file by name, as they are written.

    Raises:
        UserError: There is no such file, or it holds none.
    """
    settings = read_yaml(path)
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no settings by name; expected those of a recipe or a run")
    return settings


def require_found(config: str | Path, wanted: Mapping[str, Any]) -> None:
    """Refuse ``wanted`` settings whose paths a run's or comparison's configuration names, and that are not there.

    Raises:
        UserError: naming the setting, and every place where it was looked for.
    """
    written, names = read_settings(config), [name for _, name in _paths(wanted)]
    for setting, name in _paths(written):
        places = looked_for(name, written, Path(config).parent)
        # A relative name of a critic may be one of the Hub's.
        if name in names and (setting != "critic" or os.path.isabs(name)) and not any(map(os.path.exists, places)):
            missing = {"data": "/manifest.json: no such file", "critic": ": no such folder", "pairs": ": no such file"}
            raise UserError(
                f"{name}{missing[setting]}; it is {setting} of {config}, looked for at {' and at '.join(places)}; "
                f"give another {setting}"
            )


def _paths(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Each setting that names files, or may, with what it names."""
    found = []
    _changed(settings, lambda setting, name: found.append((setting, name)) or name)
    return found


def _changed(settings: Mapping[str, Any], change: Callable[[str, str], str]) -> dict[str, Any]:
    """Settings with each path changed."""

    def of(setting: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: of(name, each) for name, each in value.items()}
        if setting in PATHS and isinstance(value, list):
            return [of(setting, each) for each in value]
        return change(setting, value) if setting in PATHS and isinstance(value, str) else value

    return {setting: of(setting, value) for setting, value in settings.items()}
