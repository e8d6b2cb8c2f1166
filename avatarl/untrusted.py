"""Checks of untrusted files and folders before a library reads them, and of places before anything is written."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .errors import UserError

LARGEST_CONFIG_BYTES = 1 << 24
# A run that somebody else made holds a configuration too, and YAML can keep a parser busy without end.
LARGEST_RECIPE_BYTES = 1 << 16
DEEPEST_RECIPE = 20
MOST_ALIASES = 20
# Layers, heads, experts, labels: libraries make a Python object of each before they read a single weight.
MOST_PARTS = 1 << 20
# Text compresses to a third or a tenth of its size; gzip compresses zeros a thousandfold, other formats without limit.
LEAST_UNPACKED_BYTES = 1 << 24
MOST_EXPANSION = 100


def read_regular_file(path: Path, most_bytes: int) -> bytes:
    """Read a file.

    Raises:
        OSError: It is not a regular file (reading a pipe might never end) or cannot be read.
        ValueError: It is larger than ``most_bytes``.
    """
    if not os.path.isfile(path):  # unlike Path.is_file, os.path.isfile takes any name
        raise FileNotFoundError("no such regular file")
    if path.stat().st_size > most_bytes:
        raise ValueError(f"has {path.stat().st_size} bytes; at most {most_bytes} are expected")
    return path.read_bytes()


class Allowance:
    """A limit on what a compressed file may hold: many times more than any text that compresses to its size."""

    def __init__(self, path: Path):
        self._path, self._most = path, LEAST_UNPACKED_BYTES + MOST_EXPANSION * os.path.getsize(path)
        self._left = self._most

    def spend(self, bytes_unpacked: int) -> None:
        """Count bytes; raise a UserError beyond the limit."""
        self._left -= bytes_unpacked
        if self._left < 0:
            raise UserError(
                f"{self._path}: holds more than {self._most:,} bytes once unpacked, more than any text of its size"
            )


class Unpacking(io.RawIOBase):
    """A decompressed stream that ends in a UserError beyond its :class:`Allowance`."""

    def __init__(self, stream: IO[bytes], path: Path):
        self._stream, self._allowance = stream, Allowance(path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        count = self._stream.readinto(buffer)
        self._allowance.spend(count)
        return count


def read_json(path: Path, most_bytes: int = LARGEST_CONFIG_BYTES) -> Any:
    """Read a JSON file.

    Raises:
        OSError: It is not a regular file or cannot be read.
        ValueError: It is too large or not JSON.
    """
    return parse_json(read_regular_file(path, most_bytes))


def parse_json(content: bytes) -> Any:
    """Parse JSON text; raise ValueError for anything that Python cannot read, deep nesting included."""
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def require_unicode(setting: str, path: str | Path) -> None:
    """Refuse a path that is not UTF-8, which some libraries and files of settings cannot hold."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{setting} is {path}, which is not UTF-8; a path in UTF-8 is expected") from error


def check_place(out: Path) -> None:
    """Refuse a folder that cannot be made, before any work: a link to nothing, or a place below a file."""
    require_unicode("out", out)
    try:
        os.lstat(out)
    except OSError as error:
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):  # a name that is too long
            raise UserError(f"out is {out}, which cannot be made ({error.strerror}); expected a folder") from error
    if os.path.islink(out) and not os.path.exists(out):
        raise UserError(f"out is {out}, a link to what does not exist; expected a folder, or a name that is free")
    above = next((folder for folder in out.parents if os.path.lexists(folder)), out)
    if above != out and not os.path.isdir(above):
        raise UserError(f"out is {out}, which cannot be made: {above} is not a folder; expected a place in one")


def check_writable(out: str | Path) -> None:
    """Refuse a file that cannot be written, before any work.

    Raises:
        UserError: naming what is in the way.
    """
    if os.path.exists(out) and not os.path.isfile(out):
        raise UserError(f"out is {out}, which is {'a folder' if os.path.isdir(out) else 'no file'}; expected a file")
    folder = os.path.dirname(os.path.realpath(out))  # the folder of a link's target
    if not os.path.isdir(folder):
        raise UserError(f"out is {out}, whose folder does not exist; expected a file in one that does")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"out is {out}, whose folder cannot be written in; expected a file in one that can")


@contextmanager
def refusing(before: str, after: str = "") -> Iterator[None]:
    """Turn any error of a library that reads an untrusted file into a UserError: before, the reason, after."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{before}{_reason(error)}{after}") from error
    except BaseException as error:
        # A panic in a Rust library is not an Exception, and its class cannot be imported.
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{before}{_reason(error)}{after}") from error


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text if len(text) <= 240 else f"{text[:238]} …") or type(error).__name__


def check_library_folder(folder: Path) -> None:
    """Refuse a tokenizer or model folder that would make ``transformers`` hang, fill the memory or unpickle.

    Raises:
        UserError: An entry is a pipe, socket or device; or config.json is not a configuration, asks for more parts than
            any model has, or names weights that would be unpickled.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if (
                entry.name.endswith((".json", ".safetensors", ".txt", ".model", ".jinja", ".bpe"))
                and not os.path.isfile(entry.path)  # unlike entry.is_file, it follows any link
            ):
                raise UserError(f"{entry.path}: not a regular file")
    path = folder / "config.json"
    if not path.exists():
        return
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a model's configuration ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a model's configuration; a JSON object is expected")
    for name, value in _settings(config):
        if isinstance(value, (int, float)) and value > MOST_PARTS and _counts_parts(name):
            raise UserError(f"{path}: {name} is {value}; at most {MOST_PARTS} is expected")
        if name == "transformers_weights" and value is not None:
            raise UserError(f"{path}: transformers_weights is {value!r}; weights in model.safetensors are expected")


def _counts_parts(name: str) -> bool:
    return name.startswith(("num_", "n_")) or "layer" in name


def _settings(config: dict) -> Iterator[tuple[str, Any]]:
    """Yield every name and value in a configuration, nested ones included."""
    waiting: list[tuple[str, Any]] = [("", config)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting.extend(value.items())
        elif isinstance(value, list):
            waiting.extend((name, item) for item in value)
        else:
            yield name, value


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file with PyYAML's safe loader.

    Raises:
        UserError: There is no such file, it cannot be read, or reading it would take without end.
    """
    import yaml

    if not os.path.isfile(path):
        raise UserError(f"config {path}: no such file; expected a recipe (YAML)")
    with refusing(f"config {path} cannot be read (", ")"):
        content = read_regular_file(Path(path), LARGEST_RECIPE_BYTES).decode("utf-8")
        collections: list[str | None] = []  # the anchor of each that is open
        aliases = 0
        for event in yaml.parse(content, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            if isinstance(event, yaml.CollectionStartEvent):
                collections.append(event.anchor)
            elif isinstance(event, yaml.CollectionEndEvent):
                collections.pop()
            elif isinstance(event, yaml.AliasEvent):
                aliases += 1
                if aliases > MOST_ALIASES or any(collections):  # aliases of aliases multiply
                    raise UserError(f"config {path} has too many aliases; write the settings out")
            if len(collections) > DEEPEST_RECIPE:
                raise UserError(f"config {path} is nested more than {DEEPEST_RECIPE} deep; expected settings by name")
        return yaml.safe_load(content)
