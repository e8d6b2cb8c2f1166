"""Files and folders from outside, before a library is trusted with them and after it has failed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError

LARGEST_CONFIG_BYTES = 1 << 24
# Layers, heads, experts, labels: libraries make a Python object for each, before they look at a single weight.
MOST_PARTS = 1 << 20
LARGEST_RECIPE_BYTES = 1 << 16
DEEPEST_RECIPE = 20
MOST_ALIASES = 20  # so few stand for at most some thousand times as many entries, however they are nested


def read_regular_file(path: Path, most_bytes: int) -> bytes:
    """A file's content.

    Raises:
        OSError: It is no regular file (reading a pipe might never end) or cannot be read.
        ValueError: It is too large.
    """
    if not os.path.isfile(path):  # unlike `Path.is_file`, it takes any name
        raise FileNotFoundError("no such regular file")
    if path.stat().st_size > most_bytes:
        raise ValueError(f"has {path.stat().st_size} bytes; at most {most_bytes} are expected")
    return path.read_bytes()


def parse_json(content: bytes) -> Any:
    """What JSON text holds; ValueError for whatever Python cannot read, deep nesting included."""
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def require_unicode(setting: str, path: str | Path) -> None:
    """Refuse a path whose bytes are no UTF-8: some libraries, and files that hold settings, cannot take it."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{setting} is {path}, which is not UTF-8; a path in UTF-8 is expected") from error


def check_place(out: Path) -> None:
    """Refuse a folder that cannot be made, before there is anything to put into it: a link to nothing, or in a file."""
    require_unicode("out", out)
    if os.path.islink(out) and not os.path.exists(out):
        raise UserError(f"out is {out}, a link to what does not exist; expected a folder, or a name that is free")
    above = next((folder for folder in out.parents if os.path.lexists(folder)), out)
    if above != out and not os.path.isdir(above):
        raise UserError(f"out is {out}, which cannot be made: {above} is no folder; expected a name in one")


def check_writable(out: str | Path) -> None:
    """Refuse a file that cannot be written, before there is anything to write.

    Raises:
        UserError: naming what is in the way.
    """
    if os.path.exists(out) and not os.path.isfile(out):
        raise UserError(f"out is {out}, which is {'a folder' if os.path.isdir(out) else 'no file'}; expected a file")
    folder = os.path.dirname(os.path.realpath(out))  # of a link, where it leads
    if not os.path.isdir(folder):
        raise UserError(f"out is {out}, whose folder does not exist; expected a file in one that does")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"out is {out}, whose folder cannot be written in; expected a file in one that can")


@contextmanager
def refusing(before: str, after: str = "") -> Iterator[None]:
    """Whatever a library makes of a file that is not what it should be, as a UserError: before, the reason, after."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{before}{_reason(error)}{after}") from error
    except BaseException as error:
        # A panic in a Rust library arrives as no ordinary Exception, and its class cannot be imported.
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{before}{_reason(error)}{after}") from error


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text if len(text) <= 240 else f"{text[:238]} …") or type(error).__name__


def check_library_folder(folder: Path) -> None:
    """Refuse a tokenizer or model folder that would have ``transformers`` wait, grow without end or run other code.

    Raises:
        UserError: An entry is a pipe, socket or device; or config.json is not a configuration, names more parts than
            any model has, weights that would be unpickled, or an implementation to be fetched from the Hub.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if (
                entry.name.endswith((".json", ".safetensors", ".txt", ".model", ".jinja", ".bpe"))
                and not os.path.isfile(entry.path)  # unlike `entry.is_file`, of whatever kind the link is
            ):
                raise UserError(f"{entry.path}: not a regular file")
    path = folder / "config.json"
    if not path.exists():
        return
    try:
        config = parse_json(read_regular_file(path, LARGEST_CONFIG_BYTES))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a model's configuration ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a model's configuration; a JSON object is expected")
    for name, value in _settings(config):
        if isinstance(value, (int, float)) and value > MOST_PARTS and _counts_parts(name):
            raise UserError(f"{path}: {name} is {value}; at most {MOST_PARTS} is expected")
        if isinstance(value, str) and "/" in value and "implementation" in name:
            raise UserError(f"{path}: {name} is {value!r}; code from the Hub is not run")
        if name == "transformers_weights" and value is not None:
            raise UserError(f"{path}: transformers_weights is {value!r}; weights in model.safetensors are expected")


def _counts_parts(name: str) -> bool:
    return name.startswith(("num_", "n_")) or "layer" in name


def _settings(config: dict) -> Iterator[tuple[str, Any]]:
    """Every name and value in a configuration, those of nested ones included."""
    waiting: list[tuple[str, Any]] = [("", config)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting.extend(value.items())
        elif isinstance(value, list):
            waiting.extend((name, item) for item in value)
        else:
            yield name, value


def check_recipe(path: str | Path) -> None:
    """Refuse a YAML file that a parser would choke on: too long, too deep, or a few aliases that stand for millions.

    What is no text is left to the parser to refuse.

    Raises:
        UserError: It is none that settings are written in.
    """
    import yaml

    if not os.path.isfile(path):
        raise UserError(f"config {path}: no such file; a recipe (YAML) is expected")
    size = os.path.getsize(path)
    if size > LARGEST_RECIPE_BYTES:
        raise UserError(f"config {path}: has {size:,} bytes; a recipe of at most {LARGEST_RECIPE_BYTES:,} is expected")
    depth = aliases = 0
    try:
        for event in yaml.parse(Path(path).read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            aliases += isinstance(event, yaml.AliasEvent)
            if depth > DEEPEST_RECIPE:
                raise UserError(f"config {path}: nested more than {DEEPEST_RECIPE} deep; settings by name are expected")
            if aliases > MOST_ALIASES:
                raise UserError(f"config {path}: has more than {MOST_ALIASES} aliases; write the settings out")
    except UserError:
        raise
    except yaml.MarkedYAMLError as error:
        raise UserError(f"config {path}: parsing it as YAML failed ({_reason(error)})") from error
    except (yaml.YAMLError, ValueError):
        return
