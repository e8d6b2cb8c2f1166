"""Measure what tokenizing loses and what sources repeat: unknown tokens, lost characters, copies of documents."""

from __future__ import annotations

import functools
import hashlib
import json
import unicodedata
from array import array
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from avatarl.data.readers import Piece
from avatarl.untrusted import refusing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Decoding takes about as long as encoding. So much is always decoded, and of a longer text a part that lies spread.
DECODED_CHARACTERS, DECODED_SHARE = 1_000_000, 1 / 32


class Fidelity:
    """Counts, piece by piece, the unknown tokens, and the characters that do not come back from the tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._unknown_ids = unknown_ids(tokenizer)
        self._tokens = self._unknown = 0
        self._characters = self._decoded = 0
        self._letters = self._lost = 0

    def add(self, text: str, ids: list[int]) -> None:
        """Take a piece of text and its ids, without an end of text."""
        self._tokens += len(ids)
        self._unknown += sum(map(ids.count, self._unknown_ids))
        self._characters += len(text)
        if self._decoded <= max(DECODED_CHARACTERS, DECODED_SHARE * self._characters):
            self._decoded += len(text)
            with refusing("tokenizer: cannot decode what it encoded (", ")"):
                decoded = self._tokenizer.decode([token for token in ids if token not in self._unknown_ids])
            letters = _letters(text)
            self._letters += letters.total()
            self._lost += (letters - _letters(decoded)).total()

    def shares(self) -> dict[str, float]:
        """The shares of all tokens that are unknown, and of the characters looked at that are lost."""
        return {
            "unknown_token_share": self._unknown / max(self._tokens, 1),
            "lost_character_share": self._lost / max(self._letters, 1),
        }


class Copies:
    """Finds documents that are copies of earlier ones, but for white space at their ends, in 16 bytes for each."""

    def __init__(self) -> None:
        self._digests, self._sizes = array("Q"), array("Q")
        self._begin_document()

    def add(self, piece: Piece) -> None:
        """Take the next piece of the current document."""
        text = self._space + piece.text if self._characters else piece.text.lstrip()
        kept = text.rstrip()
        self._space = text[len(kept) :]
        self._hash.update(kept.encode("utf-8"))
        self._characters += len(kept)
        if piece.ends_document:
            self._digests.append(int.from_bytes(self._hash.digest(), "little"))
            self._sizes.append(self._characters)
            self._begin_document()

    def shares(self, is_valid: bytes) -> dict[str, float]:
        """The shares of the text that repeats earlier documents, and of validation's that is in training as well.

        Args:
            is_valid: For each document whether any of it is in the validation split.
        """
        digests, sizes = np.array(self._digests, dtype=np.uint64), np.array(self._sizes, dtype=np.float64)
        valid = np.frombuffer(is_valid, dtype=bool)
        _, first = np.unique(digests, return_index=True)
        also_in_train = np.isin(digests[valid], digests[~valid])
        return {
            "repeated_share": float(1 - sizes[first].sum() / sizes.sum()),
            "repeated_share_of_valid": float(sizes[valid][also_in_train].sum() / sizes[valid].sum()),
        }

    def _begin_document(self) -> None:
        self._hash = hashlib.blake2b(digest_size=8)
        self._characters, self._space = 0, ""


def unknown_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids that stand for what has no entry. One may also end texts, as GPT-2's does; no text is encoded to it."""
    found = {tokenizer.unk_token_id}
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        model = json.loads(backend.to_str())["model"]  # which may know one that the tokenizer around it does not name
        found |= {model.get("unk_id"), backend.token_to_id(model.get("unk_token") or "")}
    return found - {None}


def _letters(text: str) -> Counter[str]:
    """Count the characters, ignoring what normalisers change: case, accents, white space, compatibility forms."""
    letters: Counter[str] = Counter()
    for character, count in Counter(text).items():
        for letter in _plain(character):
            letters[letter] += count
    return letters


@functools.cache
def _plain(character: str) -> str:
    folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", character).casefold())
    return "".join(c for c in folded if unicodedata.category(c) not in {"Mn", "Mc", "Me", "Zs", "Zl", "Zp", "Cc", "Cf"})
