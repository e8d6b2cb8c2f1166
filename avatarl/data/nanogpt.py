"""nanoGPT's token files, train.bin and val.bin, and those that llm.c and modded-nanogpt write under these names."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from avatarl.errors import UserError

FILES = {"train": "train.bin", "valid": "val.bin"}
CHUNK_BYTES = 1 << 23

# llm.c's header is 256 int32: magic, version, number of tokens, zeros.
HEADER_BYTES = 256 * 4
HEADERS = {20240520: (1, 2), 20240801: (7, 4)}  # magic: version, bytes of a token


class TokenFile(NamedTuple):
    """A file of token ids, and how they lie in it."""

    path: Path
    start: int  # bytes before the first id
    bytes_per_token: int

    def chunks(self, vocab_size: int) -> Iterator[np.ndarray]:
        """Token ids, unsigned (T,), some millions at a time; UserError for one that is not below ``vocab_size``."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            while chunk := file.read(CHUNK_BYTES):
                ids = np.frombuffer(chunk, dtype=f"<u{self.bytes_per_token}")
                if ids.max() >= vocab_size:
                    raise UserError(
                        f"{self.path}: holds token id {ids.max()}, read as {self.bytes_per_token} bytes for every "
                        f"token; the tokenizer has ids below {vocab_size}"
                    )
                yield ids


def find_token_files(sources: list[str]) -> Path | None:
    """The folder of nanoGPT's files among the sources, if there is one.

    Raises:
        UserError: It is not the only source, or its ids are of another vocabulary, or nothing is left to validate on.
    """
    folders = [Path(source) for source in sources if all(os.path.isfile(Path(source, name)) for name in FILES.values())]
    if not folders:
        return None
    folder, (train, valid) = folders[0], FILES.values()
    if len(sources) > 1:
        raise UserError(
            f"source {str(folder)!r}: nanoGPT's token files bring their own split and cannot be joined with other "
            f"sources; found {len(sources)} sources, 1 is accepted"
        )
    if os.path.lexists(folder / "meta.pkl"):  # a pickle, and so never opened
        raise UserError(
            f"{folder / 'meta.pkl'}: says that the ids beside it are of a vocabulary of their own, such as single "
            "characters; prepare the text that they were made from, or move meta.pkl away if the ids are the "
            "tokenizer's"
        )
    if filecmp.cmp(folder / train, folder / valid, shallow=False):
        raise UserError(f"{folder / valid}: holds the same tokens as {train}; a validation part of its own is expected")
    return folder


def open_token_file(path: Path, vocab_size: int) -> TokenFile:
    """Find out how the ids lie in a file: in 2 bytes each, or as llm.c's header says. The width is never guessed.

    Raises:
        UserError: The file has no token, a part of one, not as many as its header says, or wider ones without a header.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        beginning = file.read(CHUNK_BYTES)
    magic, version, tokens = np.frombuffer(beginning[:12].ljust(12, b"\0"), dtype="<i4").tolist()
    if size >= HEADER_BYTES and magic in HEADERS:
        expected, width = HEADERS[magic]
        if version != expected or size != HEADER_BYTES + tokens * width or not tokens:
            raise UserError(
                f"{path}: has llm.c's header of magic {magic}, version {version} and {tokens} tokens, and "
                f"{size - HEADER_BYTES} bytes after it; version {expected} and {width} bytes a token are expected"
            )
        return TokenFile(path, HEADER_BYTES, width)
    if not size or size % 2:
        raise UserError(f"{path}: has {size} bytes; 2 for every token, and at least one token, expected")
    numbers = np.frombuffer(beginning, dtype="<u2")
    # Ids that fit 2 bytes lie in wider ones where all that is above them is 0.
    wide = [w for w in (8, 4) if size % w == 0 and not numbers.reshape(-1, w // 2)[:, 1:].any()]
    if wide or vocab_size > 1 << 16:
        found = (
            f"holds ids of {wide[0]} bytes each" if wide else f"ids below {vocab_size} do not fit the 2 bytes of each"
        )
        raise UserError(
            f"{path}: {found}; nanoGPT's have 2, and llm.c's header before them is expected where they have 4: 256 "
            "int32, 20240801, 7, the number of ids, zeros"
        )
    return TokenFile(path, 0, 2)
