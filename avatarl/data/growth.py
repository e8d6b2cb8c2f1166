"""How much longer a tokenizer's own steps make a text, tried out before the library opens the file.

A step of a normalizer, pre-tokenizer or decoder may write more than it reads, and a chain of them multiplies: sixteen
kilobytes of replacements stand for more text than any memory holds. Each step is tried alone on what the one before it
has written, and stops being tried as soon as that is too long.
"""

from __future__ import annotations

import itertools
import json
import string
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenizers import Tokenizer

from avatarl.errors import UserError
from avatarl.untrusted import read_json

LARGEST_TOKENIZER_BYTES = 1 << 28
MOST_STEPS = 64
LONGEST_TEXT = 64  # that a step puts in or looks for, in characters
MOST_GROWTH = 32  # known tokenizers make no character longer than some ten, each a byte or a mark of its own

# Letters, digits, punctuation, white space, and characters of two to four bytes.
PROBE = "The quick brown fox, 1234!\n\tÄ漢🙂"

# How each part of tokenizer.json is tried.
APPLY: dict[str, Callable[[Tokenizer, str], str]] = {
    "normalizer": lambda step, text: step.normalizer.normalize_str(text),
    "pre_tokenizer": lambda step, text: "".join(word for word, _ in step.pre_tokenizer.pre_tokenize_str(text)),
    "decoder": lambda step, text: step.decoder.decode([text]),
}


def check_growth(folder: Path) -> None:
    """Refuse a tokenizer folder whose steps make texts more than some tens of times longer.

    Raises:
        UserError: naming the file and the part.
        Exception: of many kinds, where it is no tokenizer.
    """
    for path in sorted(folder.glob("tokenizer*.json")):  # the library has several names for it
        content = read_json(path, LARGEST_TOKENIZER_BYTES)
        for part in APPLY if isinstance(content, dict) else ():
            _check_part(f"{path}: its {part}", part, content.get(part))


def _check_part(where: str, part: str, given: object) -> None:
    settings = _steps(given, where)
    if len(settings) > MOST_STEPS:
        raise UserError(f"{where} has {len(settings):,} steps; at most {MOST_STEPS} are expected")
    texts = sorted({text for step in settings for text in _texts(step)}, key=len)
    if texts and len(texts[-1]) > LONGEST_TEXT:
        raise UserError(f"{where} has a text of {len(texts[-1]):,} characters; at most {LONGEST_TEXT} are expected")
    steps = [_tokenizer_of(part, step) for step in settings]
    # From every step on: an earlier one may take away what a later one would multiply.
    for text, first in itertools.product((PROBE, string.printable, *texts), range(len(steps))):
        most, grown = MOST_GROWTH * (len(text) + 8), text
        for step in steps[first:]:
            grown = APPLY[part](step, grown)
            if len(grown) > most:
                raise UserError(f"{where} makes {len(text)} characters into more than {most:,}; no tokenizer does")


def _steps(settings: object, where: str) -> list[dict]:
    """The steps of a part one by one, those within sequences included."""
    waiting, steps = [settings], []
    while waiting:
        step = waiting.pop()
        if not isinstance(step, dict):
            continue
        inner = [step[name] for name in ("normalizers", "pretokenizers", "decoders") if name in step]
        kind = step.get("type")
        if not isinstance(kind, str) or bool(inner) != (kind == "Sequence"):  # the library would guess
            raise UserError(f"{where} has a step of the type {kind!r}; one of the library's is expected")
        for steps_within in inner:
            waiting.extend(reversed(steps_within))
        if not inner:
            steps.append(step)
    return steps


def _texts(step: dict) -> Iterator[str]:
    """What a step puts in, and what it looks for where that is no regular expression."""
    pattern = step.get("pattern")
    found = [step.get(name) for name in ("content", "prepend", "replacement", "prefix", "suffix")]
    for text in (*found, pattern.get("String") if isinstance(pattern, dict) else None):
        if isinstance(text, str):
            yield text


def _tokenizer_of(part: str, step: dict) -> Tokenizer:
    return Tokenizer.from_str(
        json.dumps(
            {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": [], part: step}
        )
    )
