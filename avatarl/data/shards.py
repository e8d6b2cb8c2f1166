"""Write token ids to disk: shards of bounded size, divided into training and validation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from avatarl.data.dataset import BYTES, BYTES_DTYPE, TokenStream, shard_name

# With fewer documents than this, whole ones cannot come near the wanted fraction, and the end of the text is taken.
FEWEST_DOCUMENTS_TO_CHOOSE_FROM = 20

COPY_TOKENS = 1 << 20


class EncodedPiece(NamedTuple):
    """Token ids of a stretch of one document; the last stretch ends with the end-of-text id, if there is one."""

    ids: np.ndarray
    utf8_bytes: int
    ends_document: bool
    byte_lengths: np.ndarray | None = None  # of each id, where they are to be kept


@dataclass
class SplitCounts:
    """What one split holds. A document belongs to the split that it begins in; bytes are those of text alone."""

    documents: int = 0
    tokens: int = 0
    utf8_bytes: int = 0

    def add(self, documents: int, tokens: int, utf8_bytes: int) -> None:
        self.documents += documents
        self.tokens += tokens
        self.utf8_bytes += utf8_bytes


class ShardWriter:
    """Appends a number for each token to ``NAME-00000.bin``, ``NAME-00001.bin`` …, each of ``shard_tokens`` at most."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, shard_tokens: int) -> None:
        self.paths: list[Path] = []
        self._folder, self._name, self._dtype, self._shard_tokens = folder, name, dtype, shard_tokens
        self._file: IO[bytes] | None = None
        self._room = 0

    def append(self, numbers: np.ndarray) -> None:
        """Write ``numbers``, any integer array (T,) whose values fit the dtype."""
        while len(numbers):
            if self._room == 0:
                self.close()
                self.paths.append(self._folder / shard_name(self._name, len(self.paths)))
                self._file, self._room = self.paths[-1].open("wb"), self._shard_tokens
            part, numbers = numbers[: self._room], numbers[self._room :]
            self._file.write(part.astype(self._dtype).tobytes())
            self._room -= len(part)

    def close(self) -> None:
        if self._file:
            self._file.close()

    def stream(self) -> TokenStream:
        """Close the files, and read back what was written."""
        self.close()
        return TokenStream(self.paths, self._dtype)


class SplitWriter:
    """Divides documents into training and validation as they arrive, without knowing how many will come.

    The first 20 documents wait on disk. If there are so many, whole documents are chosen by a hash of their number;
    among the first 20, so that they hold at most the wanted fraction of the tokens and are at least one. With fewer,
    validation is the last part of the tokens.

    Args:
        folder: Where the shards go.
        dtype: Of the ids on disk.
        shard_tokens: The most tokens in one file.
        valid_fraction: The wanted share of validation.
        byte_lengths: Bytes of text of every id, int64 (V,); None where the pieces bring those of their own ids, which
            are then kept beside them.
    """

    def __init__(
        self, folder: Path, dtype: np.dtype, shard_tokens: int, valid_fraction: float, byte_lengths: np.ndarray | None
    ) -> None:
        columns = {"": dtype} if byte_lengths is not None else {"": dtype, BYTES: BYTES_DTYPE}
        self._writers = {
            name: [ShardWriter(folder, column + name, kind, shard_tokens) for column, kind in columns.items()]
            for name in ("train", "valid", "waiting")
        }
        self.counts = {"train": SplitCounts(), "valid": SplitCounts()}
        self._waiting: list[SplitCounts] = []  # one for each document on disk; the last may be unfinished
        self._valid_fraction = valid_fraction
        self._byte_lengths = byte_lengths
        self.is_valid = bytearray()  # of each document, whether any of it is validation
        self._document = 0
        self._begins_document = True

    def write(self, piece: EncodedPiece) -> None:
        """Take the next piece of the current document."""
        if self._document < FEWEST_DOCUMENTS_TO_CHOOSE_FROM:
            if self._begins_document:
                self._waiting.append(SplitCounts())
            name, counts = "waiting", self._waiting[-1]
        else:
            name = "valid" if _draw(self._document) < self._valid_fraction else "train"
            counts = self.counts[name]
            if piece.ends_document:
                self.is_valid.append(name == "valid")
        counts.add(self._begins_document, len(piece.ids), piece.utf8_bytes)
        for writer, numbers in zip(self._writers[name], (piece.ids, piece.byte_lengths), strict=False):
            writer.append(numbers)
        self._begins_document = piece.ends_document
        self._document += piece.ends_document
        if piece.ends_document and self._document == FEWEST_DOCUMENTS_TO_CHOOSE_FROM:
            self._place_waiting_documents()

    def finish(self) -> str:
        """Write what still waits and close the files; return in words which rule made the validation split."""
        if self._document < FEWEST_DOCUMENTS_TO_CHOOSE_FROM:
            self._cut_tail()
            rule = "the last part of the tokens"
        else:
            rule = "whole documents, chosen by a hash of their number"
        self.close()
        return rule

    def close(self) -> None:
        """Close every file, so that the folder can be removed."""
        for writer in sum(self._writers.values(), []):
            writer.close()

    def _place_waiting_documents(self) -> None:
        # Their sizes are known, so no long book can swallow the fraction, nor a short story stand for it alone.
        sizes = [document.tokens for document in self._waiting]
        room, chosen = self._valid_fraction * sum(sizes), set()
        for number in sorted(range(len(sizes)), key=_draw):
            if sizes[number] <= room:
                chosen.add(number)
                room -= sizes[number]
        chosen = chosen or {sizes.index(min(sizes))}
        streams, start = [writer.stream() for writer in self._writers["waiting"]], 0
        for number, document in enumerate(self._waiting):
            split = "valid" if number in chosen else "train"
            self.is_valid.append(split == "valid")
            self._copy(streams, start, start + document.tokens, split)
            self.counts[split].add(1, document.tokens, document.utf8_bytes)
            start += document.tokens
        self._drop_waiting_files()

    def _cut_tail(self) -> None:
        streams = [writer.stream() for writer in self._writers["waiting"]]
        tokens = len(streams[0])
        cut = tokens - min(max(1, round(tokens * self._valid_fraction)), tokens - 1)
        self._copy(streams, 0, cut, "train")
        self._copy(streams, cut, tokens, "valid")
        ends = np.cumsum([document.tokens for document in self._waiting])
        in_train = 1 + int((ends < cut).sum())  # documents that begin before the cut
        self.is_valid.extend(ends > cut)
        valid_bytes = 0
        for start in range(cut, tokens, COPY_TOKENS):
            numbers = streams[-1].slice(start, min(start + COPY_TOKENS, tokens))
            valid_bytes += int((numbers if self._byte_lengths is None else self._byte_lengths[numbers]).sum())
        all_bytes = sum(document.utf8_bytes for document in self._waiting)
        self.counts["train"].add(in_train, cut, all_bytes - valid_bytes)
        self.counts["valid"].add(len(ends) - in_train, tokens - cut, valid_bytes)
        self._drop_waiting_files()

    def _copy(self, streams: Sequence[TokenStream], start: int, stop: int, split: str) -> None:
        for stream, writer in zip(streams, self._writers[split], strict=True):
            for first in range(start, stop, COPY_TOKENS):
                writer.append(stream.slice(first, min(first + COPY_TOKENS, stop)))

    def _drop_waiting_files(self) -> None:
        for writer in self._writers["waiting"]:
            for path in writer.paths:
                path.unlink()


def _draw(document: int) -> float:
    """A number in [0, 1) that a document's number decides."""
    digest = hashlib.blake2b(document.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
