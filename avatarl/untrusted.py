"""Files and folders from outside, before a library is trusted with them and after it has failed."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from .errors import UserError

LARGEST_CONFIG_BYTES = 1 << 24
# Layers, heads, experts, labels: libraries make a Python object for each, before they look at a single weight.
MOST_PARTS = 1 << 20
LARGEST_RECIPE_BYTES = 1 << 16
DEEPEST_RECIPE = 20
# Packed text is a third to a tenth of its size; gzip makes zeros a thousand times smaller, others without limit.
LEAST_UNPACKED_BYTES = 1 << 24
MOST_EXPANSION = 100
MOST_ALIASES = 20


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


class Allowance:
    """How much a packed file may hold: many times more than any text that packs to its size."""

    def __init__(self, path: Path):
        self._path, self._most = path, LEAST_UNPACKED_BYTES + MOST_EXPANSION * os.path.getsize(path)
        self._left = self._most

    def spend(self, bytes_unpacked: int) -> None:
        """Refuse the file, by a UserError, once it has held more."""
        self._left -= bytes_unpacked
        if self._left < 0:
            raise UserError(
                f"{self._path}: holds more than {self._most:,} bytes once unpacked, which no text of its size does"
            )


class Unpacking(io.RawIOBase):
    """What a packed file holds, read from ``stream`` as far as its :class:`Allowance` goes."""

    def __init__(self, stream: IO[bytes], path: Path):
        self._stream, self._allowance = stream, Allowance(path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        count = self._stream.readinto(buffer)
        self._allowance.spend(count)
        return count


def read_json(path: Path, most_bytes: int = LARGEST_CONFIG_BYTES) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: It is no regular file or cannot be read.
        ValueError: It is too large or not JSON.
    """
    return parse_json(read_regular_file(path, most_bytes))


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
    """Refuse a tokenizer or model folder that would have ``transformers`` wait, grow without end or unpickle.

    Raises:
        UserError: An entry is a pipe, socket or device; or config.json is not a configuration, names more parts than
            any model has, or weights that would be unpickled.
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


def read_yaml(path: str | Path) -> Any:
    """What a YAML file of settings holds.

    Raises:
        UserError: :func:`check_recipe` refuses it, or it cannot be read.
    """
    import yaml

    check_recipe(path)
    with refusing(f"{path} cannot be read (", ")"):
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))


def check_recipe(path: str | Path) -> None:
    """Refuse a YAML file that a parser would choke on: too long as it is or written out, or too deep.

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
    with suppress(yaml.YAMLError, UnicodeError):
        try:
            check_yaml(Path(path).read_bytes(), f"config {path}")
        except yaml.MarkedYAMLError as error:
            raise UserError(f"config {path}: parsing it as YAML failed ({_reason(error)})") from error


def check_yaml(content: str | bytes, name: str) -> None:
    """Refuse YAML that is nested too deeply, or whose aliases stand for more than a recipe could hold without them.

    Raises:
        UserError: naming it by ``name``.
        yaml.YAMLError: It is no YAML.
    """
    import yaml

    aliases = written = 0  # characters of what is read so far, each alias replaced by what it stands for
    anchored: dict[str, int] = {}
    within: list[tuple[str | None, int]] = []  # the collections around: their anchors, and what was written before
    for event in yaml.parse(content, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        before = written
        if isinstance(event, yaml.AliasEvent):
            aliases += 1
            written += anchored.get(event.anchor, 1)  # one of itself is left to the parser
        elif isinstance(event, yaml.NodeEvent):
            written += 1 + len(getattr(event, "value", ""))
        if isinstance(event, yaml.CollectionStartEvent):
            within.append((event.anchor, before))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = within.pop()
            anchored[anchor] = written - before
        elif isinstance(event, yaml.ScalarEvent):
            anchored[event.anchor] = written - before
            if "&" in event.value and len(event.value) < len(content):  # jsonargparse reads YAML in a text
                with suppress(yaml.YAMLError, UnicodeError):
                    check_yaml(event.value, name)
        if len(within) > DEEPEST_RECIPE:
            raise UserError(f"{name}: nested more than {DEEPEST_RECIPE} deep; settings by name are expected")
        if aliases > MOST_ALIASES:
            raise UserError(f"{name}: has more than {MOST_ALIASES} aliases; write the settings out")
        if written > LARGEST_RECIPE_BYTES:
            raise UserError(
                f"{name}: holds more than {LARGEST_RECIPE_BYTES:,} characters, with its aliases written out; "
                "a smaller recipe is expected"
            )
