"""Minimal pairs as in BLiMP, from local files: does a model hold the good sentence more probable than the bad one?

Source: Warstadt et al., "BLiMP: The Benchmark of Linguistic Minimal Pairs for English", 2020.
"""

from __future__ import annotations

import codecs
import math
import os
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from transformers import PreTrainedModel

from avatarl.data.folders import files_in
from avatarl.data.tokenizer import encode_texts, end_of_text_id
from avatarl.errors import UserError
from avatarl.models.loading import head_weight, last_hidden, longest_sequence
from avatarl.untrusted import parse_json

from .likelihood import score_positions
from .players import open_player

NAMES = (("sentence_good", "sentence_bad"), ("good", "bad"))
EXPECTED = "expected a JSON object with sentence_good and sentence_bad, or good and bad"
LONGEST_JSON_LINE = 1 << 20
POSITIONS_AT_ONCE = 1024


class MinimalPair(NamedTuple):
    """Two sentences, and where they came from."""

    good: str
    bad: str
    group: str  # the line's UID, or else the name of its file
    where: str  # file:line


def score_pairs(model: str | Path, pairs: Sequence[MinimalPair], *, device: str = "auto") -> dict:
    """In how many pairs a model gives the good sentence the higher log-probability, in float32.

    A sentence stands as it is written after the end-of-text token, where documents begin in training. Every token of
    it counts; the end of the text after it does not. A tie counts half.

    Args:
        model: A run folder (its best player), a model folder or a hub id.
        pairs: From :func:`read_pairs`.
        device: ``cpu``, ``cuda`` or ``auto``.

    Returns:
        accuracy, its standard_error (None for a single pair), pairs and ties, and the same for each of ``groups``.

    Raises:
        UserError: The model cannot be used, or a sentence is longer than its context.
    """
    player = open_player(model, device)
    begin_id, longest = end_of_text_id(player.tokenizer), longest_sequence(player.model)
    if begin_id is None:
        raise UserError(f"{model}: the tokenizer has no end-of-text token; minimal pairs are read after one")
    texts = [text for pair in pairs for text in (pair.good, pair.bad)]
    sentences = [tuple(ids) for ids in encode_texts(player.tokenizer, texts)]
    for number, ids in enumerate(sentences):
        name = f"{pairs[number // 2].where}: the {('good', 'bad')[number % 2]} sentence"
        if not ids:
            raise UserError(f"{name} has no tokens; expected at least one")
        if longest is not None and len(ids) > longest:
            raise UserError(f"{name} has {len(ids)} tokens; expected at most {longest}, the model's context")

    log_probs = sentence_log_probs(player.model, sentences, begin_id, len(player.tokenizer))
    scores = []
    for pair, *sides in zip(pairs, sentences[::2], sentences[1::2], strict=True):
        good, bad = (log_probs[side] for side in sides)
        if math.isnan(good + bad):
            raise UserError(f"{model}: its logits are NaN at the pair {pair.where}")
        scores.append((good > bad) + 0.5 * (good == bad))
    groups = pd.Series(scores).groupby([pair.group for pair in pairs])
    return summarise_pairs(scores) | {"groups": {name: summarise_pairs(of_group) for name, of_group in groups}}


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
    column = pd.Series(scores)
    return {
        "accuracy": float(column.mean()),
        "standard_error": float(column.sem()) if len(column) > 1 else None,
        "pairs": len(column),
        "ties": int((column == 0.5).sum()),
    }


# --- reading --------------------------------------------------------------------------------------------------------


def read_pairs(source: str | Path) -> list[MinimalPair]:
    """Read the pairs of a ``.jsonl`` file, or of all such files in a folder; hidden ones are left out.

    A line is ``{"sentence_good": …, "sentence_bad": …}`` or ``{"good": …, "bad": …}``; its ``UID``, if it has one,
    names the group it counts in. Other fields are ignored.

    Raises:
        UserError: The source is missing or holds no pairs, or a line is malformed.
    """
    source, accepted = Path(source), "expected a .jsonl file, or a folder of them"
    if not os.path.exists(source):
        raise UserError(f"pairs {str(source)!r}: no such file or folder; {accepted}")
    is_folder = os.path.isdir(source)
    paths = [path for path in (files_in(source)[0] if is_folder else [source]) if path.suffix == ".jsonl"]
    if not paths:
        raise UserError(f"pairs {str(source)!r}: {'the folder has no .jsonl file; ' if is_folder else ''}{accepted}")
    if odd := [path for path in paths if not path.is_file()]:  # a pipe would be waited for
        raise UserError(f"pairs {str(source)!r}: {odd[0]} is not a regular file that exists")
    groups = [path.relative_to(source).with_suffix("").as_posix() if is_folder else path.stem for path in paths]
    return [pair for path, group in zip(paths, groups, strict=True) for pair in _pairs_in(path, group)]


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
    uid = {} if record.get("UID") is None else {"UID": record["UID"]}
    for field, value in ({name: record[name] for name in names} | uid).items():
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{where}: {field} is {reprlib.repr(value)}; expected some text")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"{where}: {field} holds half a surrogate pair; expected Unicode text") from error
    return MinimalPair(*(record[name] for name in names), uid.get("UID", name), where)
