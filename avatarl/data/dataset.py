"""Read a prepared folder for training: verified, never held in memory, in an order that one integer resumes."""

from __future__ import annotations

import bisect
import hashlib
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from avatarl.errors import UserError
from avatarl.files import File, ask
from avatarl.untrusted import parse_json, read_regular_file, refusing

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 1
LARGEST_MANIFEST_BYTES = 1 << 28
MANIFEST = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
SPLITS = ("train", "valid")
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
# The bytes of text that each token of a split stands for, kept beside its ids where these alone do not say.
BYTES, BYTES_DTYPE = "bytes-", np.dtype("<u4")
AGAIN = "prepare the data anew"


def shard_name(split: str, number: int) -> str:
    """The file name of a split's shard, numbered from 0."""
    return f"{split}-{number:05d}.bin"


def file_record(path: Path) -> dict[str, int | str]:
    """What the manifest says of a file: ``{"bytes": size, "sha256": hex}``."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


class TokenStream:
    """The shards of one split as one long sequence of token ids, never held in memory."""

    def __init__(self, shards: Sequence[Path | File], dtype: np.dtype, split: str = "data") -> None:
        self.split, self.dtype = split, dtype
        self.files = [shard if isinstance(shard, File) else File(shard) for shard in shards]
        sizes = [file.stamp.size // dtype.itemsize for file in self.files]
        self._starts = np.cumsum([0, *sizes]).tolist()  # (shards + 1,), the last is the length of the stream

    def __len__(self) -> int:
        return self._starts[-1]

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Token ids [start, stop), int64 (stop - start,).

        Raises:
            IndexError: The stream does not have them.
            RunFailed: A shard can no longer be read, or somebody has changed it.
        """
        if not 0 <= start <= stop <= self._starts[-1]:
            raise IndexError(f"tokens [{start}, {stop}) of a stream of {self._starts[-1]}")
        ids = np.empty(stop - start, dtype=np.int64)
        filled, size = 0, self.dtype.itemsize
        shard = bisect.bisect_right(self._starts, start) - 1
        while filled < len(ids):
            first = start + filled - self._starts[shard]
            part = np.frombuffer(self.files[shard].read(first * size, (len(ids) - filled) * size), self.dtype)
            ids[filled : filled + len(part)] = part
            filled += len(part)
            shard += 1
        return ids


@dataclass(frozen=True)
class PreparedData:
    """An immutable view of a prepared folder; make one with :meth:`open`."""

    path: Path
    manifest: dict
    vocab_size: int
    end_of_text_id: int | None
    digest: str  # SHA-256 of manifest.json, which holds that of every other file
    train: TokenStream
    valid: TokenStream
    byte_lengths: dict[str, TokenStream]  # of each split's tokens; empty where their ids say them, or nothing does

    @classmethod
    def open(cls, path: str | Path, *, verified: str | None = None, anew: bool = False) -> PreparedData:
        """Open the folder that ``prepare`` wrote, after comparing every file with the manifest's size and SHA-256.

        Whoever writes a manifest can write matching sums as well, so the manifest and the token ids are checked too.
        Files that were compared before, and have not been touched since, are not read again.

        Args:
            path: The folder.
            verified: The ``digest`` of a folder that another process of this run has just opened. If it is this one,
                only sizes are compared.
            anew: Read every file, whatever is remembered of it.

        Raises:
            UserError: The folder was not written by ``prepare``, or a file is missing or not as it was written.
            RunFailed: A file cannot be read, or is being changed.
        """
        path = Path(path)
        content, manifest = read_manifest(path)
        digest = hashlib.sha256(content).hexdigest()
        files = {name: _open_file(path, name, record) for name, record in manifest["files"].items()}
        dtype = DTYPES[manifest["dtype"]]
        streams, byte_lengths = {}, {}
        for split in SPLITS:
            streams[split] = _stream(files, split, dtype)
            byte_lengths[split] = _stream(files, BYTES + split, BYTES_DTYPE)
            tokens, with_bytes, expected = len(streams[split]), len(byte_lengths[split]), manifest["tokens"][split]
            if with_bytes not in (0, tokens):
                raise UserError(f"{path}: {split} has {tokens} tokens, but the bytes of {with_bytes}; {AGAIN}")
            if tokens != expected:
                raise UserError(
                    f"{path / MANIFEST}: {split} has {tokens} tokens in its files, but the manifest says {expected}; "
                    f"{AGAIN}"
                )
        if verified != digest:
            _verify(path, manifest, files, streams, anew)
        return cls(
            path=path,
            manifest=manifest,
            vocab_size=manifest["vocab_size"],
            end_of_text_id=manifest["end_of_text_id"],
            digest=digest,
            byte_lengths={split: lengths for split, lengths in byte_lengths.items() if len(lengths)},
            **streams,
        )

    def check(self) -> None:
        """Raise RunFailed where the tokens are no longer those that were opened."""
        for stream in (self.train, self.valid, *self.byte_lengths.values()):
            for file in stream.files:
                file.check()

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Open the tokenizer that the data was made with, from the folder's own copy."""
        from avatarl.data.tokenizer import open_tokenizer

        folder = self.path / TOKENIZER_FOLDER
        with refusing(f"{folder}: not a tokenizer that can be opened (", f"); {AGAIN}"):
            tokenizer = open_tokenizer(folder)
        entries = len(tokenizer), 1 + max(tokenizer.get_vocab().values())
        if entries != (self.vocab_size, self.vocab_size):
            raise UserError(
                f"{folder}: has {entries[0]} entries and ids below {entries[1]}, but the manifest says "
                f"{self.vocab_size}; {AGAIN}"
            )
        return tokenizer

    def text_bytes(self, split: str, start: int, stop: int, tokenizer: PreTrainedTokenizerBase) -> int | None:
        """UTF-8 bytes of the text that tokens [start, stop) of a split stand for; an end of text has none.

        Args:
            split: ``train`` or ``valid``.
            start: The first token.
            stop: The token after the last.
            tokenizer: From :meth:`load_tokenizer`.

        Returns:
            None where the ids do not say and nothing was kept beside them: in a folder of an older version whose
            tokenizer is not byte-level.
        """
        from avatarl.data.tokenizer import decoded_bytes, token_byte_lengths

        if split in self.byte_lengths:
            return int(self.byte_lengths[split].slice(start, stop).sum())
        ids = (self.train if split == "train" else self.valid).slice(start, stop)
        lengths = token_byte_lengths(tokenizer)
        if lengths is not None:
            return int(lengths[ids].sum())
        came_as_tokens = self.manifest.get("characters", 0) is None  # there is no other text than what they decode to
        return decoded_bytes(tokenizer, ids) if came_as_tokens else None


def _stream(files: Mapping[str, File], name: str, dtype: np.dtype) -> TokenStream:
    """The shards of that name, in order."""
    shards = [files[file] for file in sorted(files) if PurePosixPath(file).match(f"{name}-*.bin")]
    for shard in shards:
        size = shard.stamp.size
        if size == 0 or size % dtype.itemsize:
            raise UserError(f"{shard.path}: has {size} bytes; whole numbers of {dtype.itemsize} bytes are expected")
    return TokenStream(shards, dtype, name)


def read_manifest(folder: Path) -> tuple[bytes, dict]:
    """Read a prepared folder's manifest, as bytes and as what they say.

    Raises:
        UserError: The folder has none, or it is not one that ``prepare`` writes.
    """
    path = folder / MANIFEST
    try:
        content = read_regular_file(path, LARGEST_MANIFEST_BYTES)
        manifest = parse_json(content)
        version = manifest["format_version"]
    except OSError as error:
        raise UserError(f"{path}: no such file; a folder made by `avatarl prepare` is expected") from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not the manifest of a prepared folder; {AGAIN}") from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version is {reprlib.repr(version)}; this version of avatarl reads {FORMAT_VERSION}"
        )
    missing = {"files", "tokens", "vocab_size", "end_of_text_id", "dtype"} - manifest.keys()
    if missing:
        raise UserError(f"{path}: {', '.join(sorted(missing))} missing; {AGAIN}")
    _check_kinds(path, manifest)
    return content, manifest


def _check_kinds(path: Path, manifest: dict) -> None:
    """Refuse a manifest whose entries are not of the kinds that ``prepare`` writes."""

    def require(holds: bool, name: str, accepted: str) -> None:
        if not holds:
            raise UserError(f"{path}: {name} is {reprlib.repr(manifest[name])}; accepted {accepted}; {AGAIN}")

    def is_count(value: Any, least: int = 0, most: int = 1 << 60) -> bool:
        return type(value) is int and least <= value <= most  # to Python, `true` is an int as well

    def is_record(value: Any) -> bool:
        return isinstance(value, dict) and {k: type(v) for k, v in value.items()} == {"bytes": int, "sha256": str}

    dtype, end_id, tokens, files = (manifest[name] for name in ("dtype", "end_of_text_id", "tokens", "files"))
    require(isinstance(dtype, str) and dtype in DTYPES, "dtype", f"are {', '.join(DTYPES)}")
    most = 1 << 8 * DTYPES[dtype].itemsize
    require(is_count(manifest["vocab_size"], 1, most), "vocab_size", f"is 1 to {most}")
    largest = manifest["vocab_size"] - 1
    require(end_id is None or is_count(end_id, 0, largest), "end_of_text_id", f"is null or a token id up to {largest}")
    are_counts = isinstance(tokens, dict) and all(is_count(tokens.get(split)) for split in SPLITS)
    require(are_counts, "tokens", "is the number of tokens of train and valid")
    are_records = isinstance(files, dict) and all(map(is_record, files.values()))
    require(are_records, "files", "is bytes and sha256 by file")


def _open_file(folder: Path, name: str, expected: dict) -> File:
    path = folder / name
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise UserError(f"{folder / MANIFEST}: names {name!r}, a file outside of its folder; {AGAIN}")
    if not os.path.isfile(path):  # unlike `Path.is_file`, it takes any name; a pipe is none, and is not waited for
        raise UserError(f"{path}: missing, though the manifest names it; {AGAIN}")
    file = File(path, expected["sha256"])
    if file.stamp.size != expected["bytes"]:
        raise UserError(f"{path}: has {file.stamp.size} bytes, but the manifest says {expected['bytes']}; {AGAIN}")
    return file


def _verify(
    folder: Path, manifest: dict, files: Mapping[str, File], streams: Mapping[str, TokenStream], anew: bool
) -> None:
    """Compare the content of all files with the manifest."""
    dtype = DTYPES[manifest["dtype"]]
    ids = partial(File.look_through, unit=dtype.itemsize, largest=lambda block: int(np.frombuffer(block, dtype).max()))
    shards = {file: split for split, stream in streams.items() for file in stream.files}
    questions = [
        (file, f"sha256 and largest {dtype}", ids) if file in shards else (file, "sha256", File.digest)
        for file in files.values()
    ]
    for file, found in zip(files.values(), ask(folder, questions, anew), strict=True):
        digest, largest = found if file in shards else (found, -1)
        if digest != file.sha256:
            raise UserError(f"{file.path}: changed since it was prepared (its SHA-256 is another); {AGAIN}")
        if largest >= manifest["vocab_size"]:
            raise UserError(
                f"{folder}: the {shards[file]} split holds token id {largest}, but the manifest says ids are below "
                f"{manifest['vocab_size']}; {AGAIN}"
            )


def spread(total: int, count: int | None) -> np.ndarray:
    """``count`` of ``total`` windows, evenly apart, the first and the last among them, int64 (count,); None: all."""
    return np.linspace(0, total - 1, total if count is None else min(count, total)).round().astype(np.int64)


class Windows:
    """The non-overlapping windows of a stream: window i predicts tokens i * block_size + 1 to (i + 1) * block_size.

    Args:
        stream: The tokens.
        block_size: Predictions in a window.
        count: Take so many windows, spread evenly, and number them from 0 (None: all).

    Raises:
        UserError: The stream is too short for one window.
    """

    def __init__(self, stream: TokenStream, block_size: int, count: int | None = None) -> None:
        if block_size < 1:
            raise UserError(f"block_size: found {block_size}; a whole number of at least 1 is expected")
        if len(stream) < block_size + 1:
            raise UserError(
                f"block_size: {block_size} needs at least {block_size + 1} tokens, but the {stream.split} split has "
                f"{len(stream)}"
            )
        self.stream, self.block_size = stream, block_size
        total = (len(stream) - 1) // block_size
        self._places = range(total) if count is None else spread(total, count).tolist()  # among all of the stream's

    def __len__(self) -> int:
        return len(self._places)

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each int64 (B, block_size); a target is the token after its input."""
        import torch

        windows = np.empty((len(indices), self.block_size + 1), dtype=np.int64)
        for row, index in enumerate(indices):
            if not 0 <= index < len(self._places):
                raise IndexError(f"window {index} of {len(self._places)}")
            start = self._places[index] * self.block_size
            windows[row] = self.stream.slice(start, start + self.block_size + 1)
        tokens = torch.from_numpy(windows)  # (B, block_size + 1)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class WindowOrder:
    """The endless order of training, epoch after epoch: a pure function of the seed and the position."""

    def __init__(self, num_windows: int, seed: int) -> None:
        if num_windows < 1:
            raise UserError(f"num_windows: found {num_windows}; at least 1 is expected")
        if seed < 0:
            raise UserError(f"seed: found {seed}; a whole number of at least 0 is expected")
        self.num_windows, self.seed = num_windows, seed
        self._epoch: int | None = None
        self._permutation = np.empty(0, dtype=np.int64)  # (num_windows,), of that epoch

    def indices(self, position: int, count: int) -> np.ndarray:
        """Window indices at positions [position, position + count), int64 (count,)."""
        if position < 0 or count < 0:
            raise IndexError(f"{count} windows from position {position}")
        chosen = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            epoch, first = divmod(position + filled, self.num_windows)
            if epoch != self._epoch:
                # NumPy promises the same raw bits for ever, but not the same `Generator.permutation`; sorting the bits
                # keeps a run resumable under another version of NumPy.
                bits = np.random.Philox(np.random.SeedSequence([self.seed, epoch])).random_raw(self.num_windows)
                self._epoch, self._permutation = epoch, np.argsort(bits, kind="stable")
            part = self._permutation[first : first + count - filled]
            chosen[filled : filled + len(part)] = part
            filled += len(part)
        return chosen
