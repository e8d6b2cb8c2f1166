"""The folder of a cache: its parts, each there whole or not at all, and the manifest that comes last.

While it is being made it holds ``cache.partial.json``, which says what it is to become, and the finished parts, each
with a record beside it. Finished, it holds ``cache.json`` with the size and SHA-256 of every part. Processes share the
parts without talking to each other: whoever finds all of them done writes the manifest, the same for all.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from avatarl.data import PreparedData, Windows
from avatarl.data.dataset import SPLITS, file_record
from avatarl.errors import RunFailed, UserError
from avatarl.untrusted import read_json

FORMAT_VERSION = 1
LARGEST_MANIFEST_BYTES = 1 << 28
MANIFEST, UNFINISHED = "cache.json", "cache.partial.json"
FREQUENCIES = "log_frequencies.bin"  # little-endian float32 (V,)
PARTIAL = re.compile(r"\.[\w.-]+\.(bin|json)\.[0-9a-f]+\.partial")  # what is being written, or was
# A process that is stopped has to repeat a part: about a hundredth of the whole, within these sizes.
SMALLEST_PART_BYTES, LARGEST_PART_BYTES, PARTS = 1 << 20, 1 << 26, 100


class Part(NamedTuple):
    """Some windows of a split, one file."""

    split: str
    number: int
    windows: range

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}.bin"


def windows_of(data: PreparedData, block_size: int, train_windows: int | None) -> dict[str, Windows]:
    """The windows of a cache: so many of the training split, spread evenly, and all of the validation split."""
    return {"train": Windows(data.train, block_size, train_windows), "valid": Windows(data.valid, block_size)}


def parts_of(identity: dict) -> Iterator[Part]:
    """The parts of a cache, in order."""
    bytes_per_window = identity["block_size"] * identity["bytes_per_token"]
    smallest, largest = SMALLEST_PART_BYTES // bytes_per_window, LARGEST_PART_BYTES // bytes_per_window
    size = max(1, smallest, min(largest, sum(identity["windows"].values()) // PARTS))
    for split, count in identity["windows"].items():
        for number, first in enumerate(range(0, count, size)):
            yield Part(split, number, range(first, min(first + size, count)))


def start(out: Path, identity: dict, parts: list[Part], log_frequencies: np.ndarray) -> None:
    """Make the folder, or accept the one that this same command has left.

    Raises:
        UserError: It holds something else.
        RunFailed: There is no room for the cache.
    """
    if os.path.exists(out) and not out.is_dir():
        raise UserError(f"out is {out}, which is a file; expected a folder to make")
    names = os.listdir(out) if out.is_dir() else []
    described = next((name for name in (MANIFEST, UNFINISHED) if name in names), None)
    if described:
        _check_same_cache(out / described, identity)
    elif any(not name.startswith(".") and name != FREQUENCIES for name in names):
        raise UserError(f"out is {out}, which already holds files; give another folder, or that of this cache")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / FREQUENCIES, log_frequencies.astype("<f4").tobytes())
        write_whole(out / UNFINISHED, json.dumps(identity, indent=1).encode())
    tidy(out)
    missing = sum(len(part.windows) for part in parts if not is_done(out, part))
    needed = missing * identity["block_size"] * identity["bytes_per_token"]
    free = shutil.disk_usage(out).free
    if needed > free:
        raise RunFailed(
            f"{out} needs {needed / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free; a smaller bytes_per_token "
            "needs less"
        )


def _check_same_cache(path: Path, identity: dict) -> None:
    """Refuse to continue a cache that was begun as another."""

    def wherever_it_lies(identity: dict) -> dict:
        critic = {name: value for name, value in identity["critic"].items() if name not in ("name", "place")}
        return {name: value for name, value in identity.items() if name != "files"} | {"critic": critic}

    try:
        try:
            found = read_json(path, LARGEST_MANIFEST_BYTES)
        except FileNotFoundError:  # gone since it was seen: another process has finished the cache
            found = read_json(path.with_name(MANIFEST), LARGEST_MANIFEST_BYTES)
        found, wanted = wherever_it_lies(found), wherever_it_lies(identity)
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not what `avatarl critic cache` writes; give another folder") from error
    if found == wanted:
        return
    others = ("tokenizer", "data", "critic")  # first, since more follows from them
    name = next((name for name in (*others, *wanted) if found.get(name) != wanted[name]), "format_version")
    difference = f"another {name}" if name in others else f"{name} {found.get(name)!r}, not {wanted[name]!r}"
    raise UserError(f"out is {path.parent}, a cache of {difference}; give another folder")


def finish(out: Path, identity: dict, parts: list[Part]) -> dict:
    """Write the manifest if every part is done; return what is known by then."""
    try:
        if all(is_done(out, part) for part in parts) and not os.path.isfile(out / MANIFEST):
            files = {part.name: read_json(record_path(out, part)) for part in parts}
            files[FREQUENCIES] = file_record(out / FREQUENCIES)
            write_whole(out / MANIFEST, (json.dumps({**identity, "files": files}, indent=1) + "\n").encode())
    except FileNotFoundError:  # another process has written it meanwhile, and tidied up
        if not os.path.isfile(out / MANIFEST):
            raise
    tidy(out)
    is_finished = os.path.isfile(out / MANIFEST)
    return read_json(out / MANIFEST, LARGEST_MANIFEST_BYTES) if is_finished else identity


def is_done(out: Path, part: Part) -> bool:
    """Whether a part is there."""
    return os.path.isfile(out / part.name) and any(map(os.path.isfile, (record_path(out, part), out / MANIFEST)))


def record_path(out: Path, part: Part) -> Path:
    """Where size and SHA-256 of a part are kept until the manifest has them."""
    return out / f"{part.name}.json"


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the name of ``path`` when it is whole; several processes may write the same at once.

    Each writes beside it under a name of its own, which it holds a lock on, so that others know whom it belongs to.
    """
    while True:
        partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
        with partial.open("xb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not partial.exists():  # it was nobody's until it was locked, and another process has tidied it away
                continue
            yield file
            file.flush()
            os.fsync(file.fileno())
            partial.replace(path)
            return


def write_whole(path: Path, content: bytes) -> None:
    """Give ``path`` this content; a reader finds all of it or nothing."""
    with new_file(path) as file:
        file.write(content)


def tidy(out: Path) -> None:
    """Remove what killed processes have left half written, and what a finished cache needs no more.

    What lies there under other names, or is a link, is somebody else's and stays.
    """
    for partial in filter(lambda path: PARTIAL.fullmatch(path.name), out.glob(".*.partial")):
        with contextlib.suppress(OSError), open(os.open(partial, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused where somebody is writing
            partial.unlink()
    if os.path.isfile(out / MANIFEST):
        for path in (out / UNFINISHED, *(path for split in SPLITS for path in out.glob(f"{split}-[0-9]*.bin.json"))):
            path.unlink(missing_ok=True)
