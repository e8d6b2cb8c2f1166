"""Read a finished cache: verified, never held in memory, and of the data at hand."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from avatarl.data import PreparedData
from avatarl.errors import UserError
from avatarl.files import File, ask
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

if TYPE_CHECKING:
    from avatarl.objective import CachedAnswers

# What reading a manifest that somebody else wrote may end in.
NOT_OURS = (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError)
AGAIN = "make it anew with `avatarl critic cache`"


def is_cache(path: str | Path) -> bool:
    """Whether a folder is a cache, finished or not."""
    return any(os.path.isfile(Path(path) / name) for name in (MANIFEST, UNFINISHED))


class CriticCache:
    """A critic's answers for every window of the data; make one with :meth:`open`."""

    def __init__(self, path: Path, manifest: dict, digest: str, data: PreparedData, files: Mapping[str, File]):
        import torch

        self.path, self.manifest, self.digest, self._files = path, manifest, digest, files
        self.record = record_format(manifest)
        self._log_frequencies = torch.from_numpy(_log_frequencies(files).copy())
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
            data: The data that it has to be of.
            block_size: Tokens in the windows to be read.
            train_windows: How many of the training split these are, spread evenly (None: all).
            splits: The splits to be read. Validation is whole in the cache of any part of the training split.
            verified: The ``digest`` of a cache that another process of this run has just opened. If it is this one,
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
        found, count = manifest["windows"], train_windows if "train" in splits else manifest["windows"]["train"]
        windows = {split: len(of_split) for split, of_split in windows_of(data, block_size, count).items()}
        if found != windows:
            raise UserError(
                f"{path}: covers {found['train']} train and {found['valid']} valid windows; expected "
                f"{windows['train']} and {windows['valid']}; {AGAIN}, --train_windows"
            )
        digest, files = hashlib.sha256(content).hexdigest(), open_files(path, manifest)
        if verified != digest:
            verify_files(path, manifest, files)
        return cls(path, manifest, digest, data, files)

    @property
    def flops(self) -> int:
        """Of the critic's forward passes on the training windows; see :func:`training_flops`."""
        return training_flops(self.manifest)

    def rows(self, split: str, indices: Sequence[int] | np.ndarray) -> CachedAnswers:
        """The stored answers for windows (B, T) of ``train`` or ``valid``, in host memory.

        Raises:
            IndexError: There is no such window.
            RunFailed: A part can no longer be read, or somebody has changed it.
        """
        windows, parts, dtype = self._windows[split], self._parts[split], self.record.dtype
        records = np.empty((len(indices), windows.block_size), dtype)  # (B, T)
        for row, index in enumerate(map(int, indices)):
            if not 0 <= index < len(windows):
                raise IndexError(f"window {index} of {len(windows)}")
            number, start = divmod(index * records[row].nbytes, parts[0].stamp.size)  # all but the last are of one size
            records[row] = np.frombuffer(parts[number].read(start, records[row].nbytes), dtype)
        _, targets = windows.batch(indices)
        return self.record.unpack(records, targets, self._log_frequencies)

    def check(self) -> None:
        """Raise RunFailed where the answers are no longer those that were opened."""
        for file in self._files.values():
            file.check()


def record_format(manifest: dict) -> RecordFormat:
    """What a position stores."""
    return RecordFormat(manifest["num_top"], manifest["num_draws"], manifest["vocab_size"])


def read_manifest(path: Path) -> tuple[bytes, dict]:
    """Read the manifest of a finished cache, as bytes and as what they say, without looking at the parts.

    Raises:
        UserError: The cache is not finished, of another version, or the manifest is not one.
    """
    if not os.path.isfile(path / MANIFEST):
        raise UserError(_unfinished(path))
    try:
        content = read_regular_file(path / MANIFEST, LARGEST_MANIFEST_BYTES)
        manifest = parse_json(content)
        version = manifest["format_version"]
        if version == FORMAT_VERSION:
            _check_kinds(manifest)
    except NOT_OURS as error:
        raise UserError(f"{path / MANIFEST}: not what `avatarl critic cache` writes; {AGAIN}") from error
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format_version is {version!r}; this version of avatarl reads {FORMAT_VERSION}")
    return content, manifest


def training_flops(manifest: dict) -> int:
    """FLOPs of the critic's forward passes on a cache's training windows.

    Those on validation windows are left out: they serve evaluations, which a run with a live critic does not count.
    """
    return manifest["critic"]["flops_per_token"] * manifest["windows"]["train"] * manifest["block_size"]


def _unfinished(path: Path) -> str:
    """The message about a folder without a manifest."""
    try:
        parts = list(parts_of(read_json(path / UNFINISHED, LARGEST_MANIFEST_BYTES)))
        done, total = (sum(len(p.windows) for p in some) for some in ([p for p in parts if is_done(path, p)], parts))
    except NOT_OURS:
        return f"{path}: not a finished cache; expected a folder made by `avatarl critic cache`"
    return f"{path}: not finished, it covers {done:,} of {total:,} windows; repeat the command that began it"


def _check_kinds(manifest: dict) -> None:
    """Raise a ValueError, KeyError or TypeError unless everything is of the kind that is written."""
    critic, files = manifest["critic"], manifest["files"]
    numbers = ("block_size", "num_top", "num_draws", "vocab_size", "bytes_per_token")
    counts = [*(manifest[name] for name in numbers), *(manifest["windows"][split] for split in SPLITS)]
    holds = (
        all(type(count) is int and 0 <= count < 1 << 60 for count in (*counts, critic["flops_per_token"]))
        and manifest["block_size"] >= 1
        and 1 <= manifest["vocab_size"] >= manifest["num_top"]
        and manifest["num_draws"] <= 1 << 16
        and record_format(manifest).dtype.itemsize == manifest["bytes_per_token"]
        and all(isinstance(text, str) for text in (manifest["data"], manifest["tokenizer"], critic["name"]))
        and isinstance(critic["files"], (dict, type(None)))
        and set(files) == {FREQUENCIES, *(part.name for part in parts_of(manifest))}
        and all(type(entry["bytes"]) is int and isinstance(entry["sha256"], str) for entry in files.values())
    )
    if not holds:
        raise ValueError("not what is written")


def open_files(path: Path, manifest: dict) -> dict[str, File]:
    """Open the files of a cache, by name.

    Raises:
        UserError: One is missing or of another size.
    """
    per_window, files = manifest["block_size"] * manifest["bytes_per_token"], {}
    sizes = {part.name: len(part.windows) * per_window for part in parts_of(manifest)}
    for name, size in {**sizes, FREQUENCIES: 4 * manifest["vocab_size"]}.items():
        if not os.path.isfile(path / name):
            raise UserError(f"{path / name}: missing; {AGAIN}")
        file = files[name] = File(path / name, manifest["files"][name]["sha256"])
        if file.stamp.size != size or manifest["files"][name]["bytes"] != size:
            raise UserError(f"{file.path}: has {file.stamp.size} bytes; {size} are expected; {AGAIN}")
    return files


def verify_files(path: Path, manifest: dict, files: Mapping[str, File], anew: bool = False) -> None:
    """Refuse a cache with a file that is not as it was written, or of a critic that is not as it was.

    Raises:
        UserError: The file or the critic has changed.
    """
    critic, made_of = manifest["critic"]["name"], manifest["critic"]["files"]
    beside = manifest["critic"].get("place")  # where the critic lay from the cache, should both have been moved
    if isinstance(beside, str) and os.path.exists(moved := os.path.normpath(os.path.join(path, beside))):
        critic = moved
    now = weight_files(critic, anew) if made_of else None
    if now is not None and now != made_of:
        raise UserError(f"{path}: critic {critic} has changed since the cache was made of it; {AGAIN}")
    record = record_format(manifest)

    def largest_id(block: bytes) -> int:
        records = np.frombuffer(block, record.dtype)
        return max((int(records[name].max()) for name in ("top", "draws") if records[name].size), default=-1)

    ids = partial(File.look_through, unit=record.dtype.itemsize, largest=largest_id)
    questions = [
        (file, "sha256", File.digest) if name == FREQUENCIES else (file, f"sha256 and largest of {record}", ids)
        for name, file in files.items()
    ]
    for (name, file), found in zip(files.items(), ask(path, questions, anew), strict=True):
        digest, largest = (found, -1) if name == FREQUENCIES else found
        if digest != file.sha256:
            raise UserError(f"{file.path}: changed since it was written (its SHA-256 is another); {AGAIN}")
        # Whoever writes a manifest can write matching sums as well.
        if largest >= record.vocab_size:
            raise UserError(f"{file.path}: holds a token id that is none of {record.vocab_size}; {AGAIN}")
    if not (_log_frequencies(files) <= 0).all():
        raise UserError(f"{path / FREQUENCIES}: holds a number that is no logarithm of a frequency; {AGAIN}")


def _log_frequencies(files: Mapping[str, File]) -> np.ndarray:
    file = files[FREQUENCIES]
    return np.frombuffer(file.read(0, file.stamp.size), "<f4")
