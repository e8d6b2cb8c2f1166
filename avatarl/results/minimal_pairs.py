"""Minimal pairs: does a model hold the good sentence more probable than the bad one? As BLiMP asks, from local files.

Source: Warstadt et al., "BLiMP: The Benchmark of Linguistic Minimal Pairs for English", 2020.
"""

from __future__ import annotations

import codecs
import math
import os
import reprlib
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from avatarl.data.folders import files_in
from avatarl.data.tokenizer import encode_texts, end_of_text_id
from avatarl.device import pick_device
from avatarl.errors import UserError
from avatarl.models import load_model, load_tokenizer
from avatarl.models.loading import check_rows, head_weight, last_hidden, longest_sequence
from avatarl.untrusted import parse_json

from .evaluate import score_positions

NAMES = (("sentence_good", "sentence_bad"), ("good", "bad"))
EXPECTED = "a JSON object with sentence_good and sentence_bad, or good and bad, is expected"
LONGEST_JSON_LINE = 1 << 20
POSITIONS_AT_ONCE = 1024


class MinimalPair(NamedTuple):
    """Two sentences, and where they came from."""

    good: str
    bad: str
    group: str  # the line's UID, or else the name of its file
    where: str  # file:line


def read_pairs(source: str | Path) -> list[MinimalPair]:
    """Read the pairs of a ``.jsonl`` file, or of all such files in a folder; hidden ones are left out.

    A line is ``{"sentence_good": …, "sentence_bad": …}`` or ``{"good": …, "bad": …}``; its ``UID``, if it has one,
    names the group it counts in. Other fields are not looked at.

    Raises:
        UserError: The source is missing or holds no pairs, or a line is none.
    """
    return [pair for path, name in _files(Path(source)) for pair in _pairs_in(path, name)]


def score_pairs(model: str | Path, pairs: Sequence[MinimalPair], *, device: str = "auto") -> dict:
    """In how many pairs a model gives the good sentence the higher log-probability, in float32.

    A sentence stands as it is written after the end-of-text token, where documents begin in training; every token of
    it counts, the end of the text after it does not. A tie counts half.

    Args:
        model: A run folder (its best player), a model folder or a hub id.
        pairs: From :func:`read_pairs`.
        device: ``cpu``, ``cuda`` or ``auto``.

    Returns:
        accuracy, its standard_error (None for a single pair), pairs and ties, and the same for each of ``groups``.

    Raises:
        UserError: The model cannot be used, or a sentence is longer than its context.
    """
    tokenizer = load_tokenizer(model)
    begin_id = end_of_text_id(tokenizer)
    if begin_id is None:
        raise UserError(f"{model}: the tokenizer has no end-of-text token; minimal pairs are read after one")
    player = load_model(model, torch.float32, pick_device(device))
    check_rows(player, tokenizer, str(model))
    good = [tuple(ids) for ids in encode_texts(tokenizer, [pair.good for pair in pairs])]
    bad = [tuple(ids) for ids in encode_texts(tokenizer, [pair.bad for pair in pairs])]
    _check_lengths(pairs, good, bad, longest_sequence(player))

    log_probs = sentence_log_probs(player, [*good, *bad], begin_id, len(tokenizer))
    groups: dict[str, list[float]] = {}
    for pair, *sides in zip(pairs, good, bad, strict=True):
        of_good, of_bad = (log_probs[side] for side in sides)
        if math.isnan(of_good) or math.isnan(of_bad):
            raise UserError(f"{model}: its logits are NaN at the pair {pair.where}")
        groups.setdefault(pair.group, []).append(1.0 if of_good > of_bad else 0.5 if of_good == of_bad else 0.0)
    total = summarise_pairs([score for scores in groups.values() for score in scores])
    return total | {"groups": {name: summarise_pairs(scores) for name, scores in sorted(groups.items())}}


@torch.no_grad()
def sentence_log_probs(
    player: PreTrainedModel, sentences: Iterable[tuple[int, ...]], begin_id: int, vocab_size: int
) -> dict[tuple[int, ...], float]:
    """Σ log π(token | ``begin_id`` and the tokens before) of each sentence, nats.

    Sentences of one length go through the model together, so none is padded; each is scored once, so that equal ones
    tie.
    """
    by_length: dict[int, list[tuple[int, ...]]] = {}
    for sentence in dict.fromkeys(sentences):
        by_length.setdefault(len(sentence), []).append(sentence)
    found = {}
    for length, rows in sorted(by_length.items()):
        rows_at_once = max(1, POSITIONS_AT_ONCE // length)
        for start in range(0, len(rows), rows_at_once):
            batch = rows[start : start + rows_at_once]
            ids = torch.tensor(batch, device=player.device)  # (B, T)
            inputs = torch.cat([torch.full_like(ids[:, :1], begin_id), ids[:, :-1]], dim=1)
            hidden = last_hidden(player, inputs).reshape(1, ids.numel(), -1)  # (1, B·T, d)
            scores = score_positions(hidden, head_weight(player), ids.reshape(1, -1), vocab_size)
            sums = -scores.cross_entropy.double().reshape(ids.shape).sum(1)  # (B,)
            found |= zip(batch, sums.tolist(), strict=True)
    return found


def summarise_pairs(scores: Sequence[float]) -> dict:
    """The mean of scores that are 1, ½ or 0, and its standard error: their sample deviation over √n."""
    count = len(scores)
    return {
        "accuracy": statistics.fmean(scores),
        "standard_error": statistics.stdev(scores) / math.sqrt(count) if count > 1 else None,
        "pairs": count,
        "ties": scores.count(0.5),
    }


def _check_lengths(
    pairs: Sequence[MinimalPair],
    good: Sequence[tuple[int, ...]],
    bad: Sequence[tuple[int, ...]],
    longest: int | None,
) -> None:
    for pair, *sides in zip(pairs, good, bad, strict=True):
        for name, ids in zip(("good", "bad"), sides, strict=True):
            if not ids:
                raise UserError(f"{pair.where}: the {name} sentence has no tokens; at least one is expected")
            if longest is not None and len(ids) > longest:
                raise UserError(
                    f"{pair.where}: the {name} sentence has {len(ids)} tokens; expected at most {longest}, the "
                    "model's context"
                )


# --- reading --------------------------------------------------------------------------------------------------------


def _files(source: Path) -> list[tuple[Path, str]]:
    """The files that a source names, sorted, each with the name of its group."""
    accepted = "a .jsonl file, or a folder of them, is expected"
    if os.path.isfile(source) and source.suffix == ".jsonl":
        return [(source, source.stem)]
    if not os.path.exists(source):
        raise UserError(f"pairs {str(source)!r}: no such file or folder; {accepted}")
    if not os.path.isdir(source):
        raise UserError(f"pairs {str(source)!r}: {accepted}")
    found = []
    for path in files_in(source)[0]:
        if path.suffix != ".jsonl":
            continue
        if not path.is_file():  # a pipe would be waited for
            raise UserError(f"pairs {str(source)!r}: {path} is not a regular file that exists")
        found.append((path, path.relative_to(source).with_suffix("").as_posix()))
    if not found:
        raise UserError(f"pairs {str(source)!r}: the folder has no .jsonl file; {accepted}")
    return found


def _pairs_in(path: Path, name: str) -> Iterator[MinimalPair]:
    empty = True
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_JSON_LINE + 1), b""), start=1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line.strip():
                    empty = False
                    yield _pair(line, name, f"{path}:{number}")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if empty:
        raise UserError(f"{path}: holds no pairs; {EXPECTED}")


def _pair(line: bytes, name: str, where: str) -> MinimalPair:
    if len(line) > LONGEST_JSON_LINE:
        raise UserError(f"{where}: the line is longer than {LONGEST_JSON_LINE:,} bytes; {EXPECTED}")
    try:
        record = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where}: not a JSON line ({error}); {EXPECTED}") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: found a JSON {type(record).__name__}; {EXPECTED}")
    names = next((pair for pair in NAMES if set(pair) <= record.keys()), None)
    if names is None:
        raise UserError(f"{where}: found {reprlib.repr(list(record))[1:-1] or 'no field'}; {EXPECTED}")
    good, bad = (_text(record[field], field, where) for field in names)
    group = record.get("UID")
    return MinimalPair(good, bad, name if group is None else _text(group, "UID", where), where)


def _text(value: object, field: str, where: str) -> str:
    """A string with something in it that can be written as UTF-8."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {field} is {reprlib.repr(value)}; some text is expected")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {field} holds half a surrogate pair; Unicode text is expected") from error
    return value
