"""A finished cache as training asks it: verified, never held in memory, and of these very data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from avatarl.data import PreparedData
from avatarl.errors import UserError
from avatarl.files import File, ask
from avatarl.objective import CachedAnswers
from avatarl.untrusted import parse_json, read_json, read_regular_file

from ..digest import digest_of_tokenizer, weight_files
from .parts import (
    FORMAT_VERSION,
    FREQUENCIES,
    LARGEST_MANIFEST_BYTES,
    MANIFEST,
    SPLITS,
    UNFINISHED,
    is_done,
    parts_of,
    windows_of,
)
from .record import RecordFormat

# What reading a manifest that somebody else wrote may end in.
NOT_OURS = (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError)
AGAIN = "make it anew with `avatarl critic cache`"


def is_cache(path: str | Path) -> bool:
    """Whether a folder is a cache, finished or not."""
    return any(os.path.isfile(Path(path) / name) for name in (MANIFEST, UNFINISHED))


class CriticCache:
    """What a critic said of every window of the data; make one with :meth:`open`."""

    def __init__(self, path: Path, manifest: dict, digest: str, data: PreparedData, files: Mapping[str, File]):
        self.path, self.manifest, self.digest, self._files = path, manifest, digest, files
        self.record = record_format(manifest)
        self._log_frequencies = torch.from_numpy(np.frombuffer(_whole(files[FREQUENCIES]), "<f4").copy())
        self._windows = windows_of(data, manifest["block_size"], manifest["windows"]["train"])
        self._parts: dict[str, list[File]] = {split: [] for split in SPLITS}
        for part in parts_of(manifest):
            self._parts[part.split].append(files[part.name])

    @classmethod
    def open(
        cls,
        path: str | Path,
        data: PreparedData,
        block_size: int,
        train_windows: int | None = None,
        splits: Collection[str] = SPLITS,
        *,
        verified: str | None = None,
    ) -> CriticCache:
        """Open a cache after comparing it with the data, and every file of it with its size and SHA-256.

        Files that were compared before, and have not been touched since, are not read again.

        Args:
            path: The folder that ``avatarl critic cache`` made.
            data: What it has to be of.
            block_size: Tokens in the windows that will be asked for.
            train_windows: How many of the training split these are, spread evenly (None: all).
            splits: Those that will be asked for. Validation is whole in the cache of any part of the training split.
            verified: The ``digest`` of the cache that another process of this run has just opened. Of the same one
                only sizes are compared.

        Raises:
            UserError: It is not finished, damaged, of another version, of other data, another tokenizer or other
                windows, or of a critic that has changed since.
            RunFailed: A file cannot be read, or is being changed.
        """
        path = Path(path)
        content, manifest = read_manifest(path)
        if manifest["data"] != data.digest:
            also = " and another tokenizer" if manifest["tokenizer"] != digest_of_tokenizer(data) else ""
            raise UserError(f"{path}: a cache of other data{also} than {data.path}; {AGAIN}")
        if manifest["block_size"] != block_size:
            raise UserError(
                f"{path}: a cache of windows of {manifest['block_size']} tokens; expected block_size, {block_size}; "
                f"{AGAIN}, --block_size {block_size}"
            )
        count = train_windows if "train" in splits else manifest["windows"]["train"]
        windows = {split: len(of_split) for split, of_split in windows_of(data, block_size, count).items()}
        if manifest["windows"] != windows:
            found = manifest["windows"]
            raise UserError(
                f"{path}: covers {found['train']} train and {found['valid']} valid windows; expected "
                f"{windows['train']} and {windows['valid']}; {AGAIN}, --train_windows"
            )
        digest, files = hashlib.sha256(content).hexdigest(), open_files(path, manifest)
        if verified != digest:
            verify(path, manifest, files)
        return cls(path, manifest, digest, data, files)

    @property
    def flops(self) -> int:
        """Of the critic's forward passes on the training windows; see :func:`training_flops`."""
        return training_flops(self.manifest)

    def rows(self, split: str, indices: Sequence[int] | np.ndarray) -> CachedAnswers:
        """What is stored of windows (B, T) of ``train`` or ``valid``, in host memory.

        Raises:
            IndexError: There is no such window.
            RunFailed: A part can no longer be read, or somebody has changed it.
        """
        records = np.stack([self._window(split, int(index)) for index in indices])  # (B, T)
        _, targets = self._windows[split].batch(indices)
        return self.record.unpack(records, targets, self._log_frequencies)

    def _window(self, split: str, index: int) -> np.ndarray:
        windows = self._windows[split]
        if not 0 <= index < len(windows):
            raise IndexError(f"window {index} of {len(windows)}")
        parts, size = self._parts[split], windows.block_size * self.record.dtype.itemsize
        number, start = divmod(index * size, parts[0].stamp.size)  # all but the last are of one size
        return np.frombuffer(parts[number].read(start, size), self.record.dtype)

    def check(self) -> None:
        """Look whether the answers are still those that were opened; RunFailed where they are not."""
        for file in self._files.values():
            file.check()


def place_of_critic(path: Path, manifest: dict) -> str:
    """Where the critic of a cache lies: from the cache as when that was made, else where it lay then."""
    name, beside = manifest["critic"]["name"], manifest["critic"].get("place")
    moved = os.path.normpath(os.path.join(path, beside)) if isinstance(beside, str) else name
    return moved if os.path.exists(moved) else name


def record_format(manifest: dict) -> RecordFormat:
    """What a position stores."""
    return RecordFormat(manifest["num_top"], manifest["num_draws"], manifest["vocab_size"])


def largest_id(records: np.ndarray) -> int:
    """The largest token id that records hold; -1 where they hold none."""
    return max((int(records[name].max()) for name in ("top", "draws") if records[name].size), default=-1)


def read_manifest(path: Path) -> tuple[bytes, dict]:
    """The manifest of a finished cache, as bytes and as what they say; the parts are not looked at.

    Raises:
        UserError: The cache is not finished, of another version, or the manifest is not one.
    """
    if not os.path.isfile(path / MANIFEST):
        raise UserError(unfinished(path))
    try:
        content = read_regular_file(path / MANIFEST, LARGEST_MANIFEST_BYTES)
        manifest = parse_json(content)
        version = manifest["format_version"]
        if version == FORMAT_VERSION:
            check_kinds(manifest)
    except NOT_OURS as error:
        raise UserError(f"{path / MANIFEST}: not what `avatarl critic cache` writes; {AGAIN}") from error
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format_version is {version!r}; this version of avatarl reads {FORMAT_VERSION}")
    return content, manifest


def training_flops(manifest: dict) -> int:
    """FLOPs of the critic's forward passes on a cache's training windows.

    Those on validation windows are left out: they serve evaluations, which cost a run with a live critic nothing.
    """
    return manifest["critic"]["flops_per_token"] * manifest["windows"]["train"] * manifest["block_size"]


def unfinished(path: Path) -> str:
    """What to say of a folder without a manifest."""
    try:
        identity = read_json(path / UNFINISHED, LARGEST_MANIFEST_BYTES)
        parts = list(parts_of(identity))
        done = sum(len(part.windows) for part in parts if is_done(path, part))
        total = sum(len(part.windows) for part in parts)
    except NOT_OURS:
        return f"{path}: not a finished cache; expected a folder made by `avatarl critic cache`"
    return f"{path}: not finished, it covers {done:,} of {total:,} windows; repeat the command that began it"


def check_kinds(manifest: dict) -> None:
    """Raise a ValueError, KeyError or TypeError unless everything is of the kind that is written."""
    numbers = ("block_size", "num_top", "num_draws", "vocab_size", "bytes_per_token")
    counts = [*(manifest[name] for name in numbers), *(manifest["windows"][split] for split in SPLITS)]
    counts += [manifest["critic"]["flops_per_token"]]
    if not all(type(count) is int and 0 <= count < 1 << 60 for count in counts):
        raise ValueError("a count is no whole number")
    if min(manifest["block_size"], manifest["vocab_size"]) < 1 or manifest["num_top"] > manifest["vocab_size"]:
        raise ValueError("a count is out of range")
    if manifest["num_draws"] > 1 << 16 or record_format(manifest).dtype.itemsize != manifest["bytes_per_token"]:
        raise ValueError("bytes_per_token is another")
    if not all(isinstance(manifest[name], str) for name in ("data", "tokenizer")):
        raise ValueError("a digest is no text")
    critic, files = manifest["critic"], manifest["files"]
    if not isinstance(critic["name"], str) or not isinstance(critic["files"], (dict, type(None))):
        raise ValueError("critic")
    if set(files) != {FREQUENCIES, *(part.name for part in parts_of(manifest))}:
        raise ValueError("files")
    for entry in files.values():
        if type(entry["bytes"]) is not int or not isinstance(entry["sha256"], str):
            raise ValueError("files")


def open_files(path: Path, manifest: dict) -> dict[str, File]:
    """The files of a cache by name; UserError names one that is missing or of another size."""
    per_window, files = manifest["block_size"] * manifest["bytes_per_token"], {}
    sizes = {part.name: len(part.windows) * per_window for part in parts_of(manifest)}
    for name, size in {**sizes, FREQUENCIES: 4 * manifest["vocab_size"]}.items():
        if not os.path.isfile(path / name):
            raise UserError(f"{path / name}: missing; {AGAIN}")
        file = files[name] = File(path / name, manifest["files"][name]["sha256"])
        if file.stamp.size != size or manifest["files"][name]["bytes"] != size:
            raise UserError(f"{file.path}: has {file.stamp.size} bytes; {size} are expected; {AGAIN}")
    return files


def verify(path: Path, manifest: dict, files: Mapping[str, File], anew: bool = False) -> None:
    """Refuse a cache with a file that is not as it was written, or of a critic that is not as it was.

    Raises:
        UserError: naming the file or the critic.
    """
    critic, made_of = place_of_critic(path, manifest), manifest["critic"]["files"]
    now = weight_files(critic, anew) if made_of else None
    if now is not None and now != made_of:
        raise UserError(f"{path}: critic {critic} has changed since the cache was made of it; {AGAIN}")
    record = record_format(manifest)
    ids = partial(
        File.look_through,
        unit=record.dtype.itemsize,
        largest=lambda block: largest_id(np.frombuffer(block, record.dtype)),
    )
    of_parts = f"sha256 and largest of {record}"
    questions = [
        (file, "sha256", File.digest) if name == FREQUENCIES else (file, of_parts, ids) for name, file in files.items()
    ]
    for (name, file), found in zip(files.items(), ask(path, questions, anew), strict=True):
        digest, largest = (found, -1) if name == FREQUENCIES else found
        if digest != file.sha256:
            raise UserError(f"{file.path}: changed since it was written (its SHA-256 is another); {AGAIN}")
        # Whoever writes a manifest can write matching sums as well.
        if largest >= record.vocab_size:
            raise UserError(f"{file.path}: holds a token id that is none of {record.vocab_size}; {AGAIN}")
    if not (np.frombuffer(_whole(files[FREQUENCIES]), "<f4") <= 0).all():
        raise UserError(f"{path / FREQUENCIES}: holds what is no logarithm of a frequency; {AGAIN}")


def _whole(file: File) -> bytes:
    return file.read(0, file.stamp.size)
