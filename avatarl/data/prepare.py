"""From text to a prepared folder: tokenize, divide, write, describe; all of it or nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from avatarl.console import Console
from avatarl.data.corpus import Piece, document_pieces
from avatarl.data.dataset import DTYPES, FORMAT_VERSION, MANIFEST, TOKENIZER_FOLDER, file_record
from avatarl.data.fidelity import Copies, Fidelity, unknown_ids
from avatarl.data.nanogpt import FILES as NANOGPT_FILES
from avatarl.data.nanogpt import find_token_files, open_token_file
from avatarl.data.shards import EncodedPiece, ShardWriter, SplitCounts, SplitWriter
from avatarl.data.tokenizer import (
    decoded_bytes,
    encode_texts,
    encode_with_bytes,
    end_of_text_id,
    resolve_tokenizer,
    token_byte_lengths,
)
from avatarl.data.unfinished import all_or_nothing
from avatarl.errors import UserError
from avatarl.untrusted import check_place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_TOKENIZER = "bpe:4096"

# Enough pieces to keep many cores busy, few enough that their encodings stay near 100 MB.
BATCH_CHARACTERS = 4_000_000

# Shares of the text or its tokens that are reported where they are not 0, and the remedy where most of it is concerned.
OTHER_TOKENIZER = "give a tokenizer made for this text, or bpe:N, which can write any"
SHARES = {
    "unknown_token_share": ("of the tokens are unknown to the tokenizer", OTHER_TOKENIZER),
    "lost_character_share": ("of the characters are lost: they do not come back from its tokens", OTHER_TOKENIZER),
    "repeated_share": ("of the text repeats earlier documents", None),
    "repeated_share_of_valid": ("of the validation text is trained on as well", "name each text once"),
}
MOST_LOST = 0.5

Report = Callable[..., None]  # report(doing="tokens", tokens=1000, note="a sentence"), all optional


def prepare(
    sources: list[str],
    out: str | Path,
    *,
    tokenizer: str = DEFAULT_TOKENIZER,
    valid_fraction: float = 0.05,
    text_field: str = "text",
    shard_tokens: int = 100_000_000,
    processes: int = 1,
    quiet: bool = False,
) -> dict:
    """Tokenize sources into a prepared folder; return its manifest.

    Memory stays bounded whatever the size of the text. The same text and settings give the same files, byte for byte,
    with any number of processes. If a tokenizer's ids do not say how many bytes of text they stand for, four more bytes
    a token keep it (``bytes-train-00000.bin`` …); those of a byte-level tokenizer do.

    What is lost or repeated on the way is reported on stderr and in the manifest: files ``left_out``, by source and
    reason; ``unknown_token_share``; ``lost_character_share`` (of the first million characters, then of every 32nd);
    ``repeated_share``, the share of the text in documents that came before, apart from white space at their ends; and
    ``repeated_share_of_valid``, that of validation text that is in training documents too.

    However it ends, nothing is left on disk; what a killed process left, the next call with the same ``out`` removes.
    A script that asks for several processes has to call this under ``if __name__ == "__main__"``.

    Args:
        sources: Files or folders (.txt .md .jsonl .parquet, and .gz of these), python-docs, hub:DATASET_ID or
            hub:DATASET_ID@CONFIG; or, alone, a folder with nanoGPT's train.bin and val.bin, whose split is kept.
        out: Folder to make; it may exist if it is empty.
        tokenizer: bpe:SIZE to train one on the text, gpt2, a tokenizer folder or a Hub id. For nanoGPT's files, whose
            ids are GPT-2's, the default is gpt2.
        valid_fraction: Share held out for validation, above 0 and at most 0.5: about this share of the documents, or
            the last part of the tokens if there are fewer than 20 documents.
        text_field: The field or column of jsonl, parquet and Hub data sets that holds the text.
        shard_tokens: The most tokens in one file.
        processes: How many processes read, each one file or shard at a time. The text that they are ahead lies beside
            out until it is tokenized.
        quiet: Show no progress and no notes on stderr.

    Raises:
        UserError: A source, the tokenizer, a setting or ``out`` cannot be used, more than half of the text is lost, or
            more than half of validation is trained on because sources repeat each other, or another process prepares
            ``out``.
        RunFailed: A process that reads is killed, or ``out`` has changed meanwhile.
        RunStopped: SIGTERM or SIGHUP, in the main thread.
    """
    if not sources:
        raise UserError("sources: none given; at least one file, folder, python-docs or hub:DATASET_ID is expected")
    if not 0 < valid_fraction <= 0.5:
        raise UserError(f"valid_fraction: found {valid_fraction}; a number above 0 and at most 0.5 is expected")
    for name, value in (("shard_tokens", shard_tokens), ("processes", processes)):
        if value < 1:
            raise UserError(f"{name}: found {value}; a whole number of at least 1 is expected")
    check_place(Path(out))
    nanogpt_folder = find_token_files(sources)
    with all_or_nothing(Path(out)) as folder, _progress(quiet) as report:
        if nanogpt_folder:
            facts = _prepare_nanogpt(nanogpt_folder, folder, tokenizer, shard_tokens, report)
        else:
            facts = _prepare_text(
                sources, folder, tokenizer, valid_fraction, text_field, shard_tokens, processes, report
            )
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        manifest = {
            "format_version": FORMAT_VERSION,
            "sources": list(sources),
            **facts,
            "files": {path.relative_to(folder).as_posix(): file_record(path) for path in files},
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


# --- text -----------------------------------------------------------------------------------------------------------


def _prepare_text(
    sources: list[str],
    folder: Path,
    spec: str,
    valid_fraction: float,
    text_field: str,
    shard_tokens: int,
    processes: int,
    report: Report,
) -> dict:
    left_out: dict[str, Counter[str]] = {}
    with contextlib.ExitStack() as reading:  # so that no process reads on when this ends, however it does

        def pieces() -> Iterator[Piece]:
            read = document_pieces(sources, text_field, processes, folder.parent, left_out)
            return reading.enter_context(contextlib.closing(read))

        report(doing="tokenizer")
        tokenizer, note = resolve_tokenizer(spec, lambda: (piece.text for piece in pieces()))
        if note:
            report(note=f"tokenizer {spec!r}: {note}")
        facts = _save_tokenizer(tokenizer, spec, folder)
        report(doing="tokens")
        byte_lengths = token_byte_lengths(tokenizer)
        splits = SplitWriter(folder, DTYPES[facts["dtype"]], shard_tokens, valid_fraction, byte_lengths)
        reading.callback(splits.close)
        fidelity, copies = Fidelity(tokenizer), Copies()
        characters = tokens = 0
        for batch in _batches(pieces()):
            characters += sum(len(piece.text) for piece in batch)
            for encoded in _encode(batch, tokenizer, facts["end_of_text_id"], fidelity, byte_lengths is None):
                tokens += len(encoded.ids)
                splits.write(encoded)
            for piece in batch:
                copies.add(piece)
            report(tokens=tokens)
        facts |= _check_shares(fidelity.shares(), f"tokenizer {spec!r}", report)
        if tokens < 2:
            raise UserError(f"sources: {tokens} tokens in all; at least 2 are needed, one to train on and one to check")
        valid_rule = splits.finish()
    # What a single source repeats is its own; several that repeat each other are one text, named twice.
    most_repeated = MOST_LOST if len(sources) > 1 else 1
    facts |= _check_shares(copies.shares(splits.is_valid), "sources", report, most_repeated)
    facts |= _counts(splits.counts, characters) | {"valid_fraction": valid_fraction, "valid_rule": valid_rule}
    for source, reasons in left_out.items():
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        report(note=f"source {source!r}: files and folders left out: {counts}")
    return facts | ({"left_out": left_out} if left_out else {})


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(
    batch: list[Piece], tokenizer: PreTrainedTokenizerBase, end_id: int | None, fidelity: Fidelity, keeps_bytes: bool
) -> Iterator[EncodedPiece]:
    texts = [piece.text for piece in batch]
    if keeps_bytes:
        encoded = encode_with_bytes(tokenizer, texts)
    else:
        encoded = [(ids, None) for ids in encode_texts(tokenizer, texts)]
    for piece, (ids, lengths) in zip(batch, encoded, strict=True):
        fidelity.add(piece.text, ids)
        if piece.ends_document and end_id is not None:
            ids.append(end_id)
            lengths = None if lengths is None else np.append(lengths, 0)
        ids = np.array(ids, dtype=np.int64)
        yield EncodedPiece(ids, len(piece.text.encode("utf-8")), piece.ends_document, lengths)


# --- nanoGPT's token files ------------------------------------------------------------------------------------------


def _prepare_nanogpt(source: Path, folder: Path, spec: str, shard_tokens: int, report: Report) -> dict:
    if spec.startswith("bpe:") and spec != DEFAULT_TOKENIZER:
        raise UserError(
            f"tokenizer {spec!r}: {source} holds token ids and no text to train on; accepted are gpt2, a tokenizer "
            "folder and a tokenizer's id on the Hugging Face Hub"
        )
    spec = "gpt2" if spec == DEFAULT_TOKENIZER else spec
    tokenizer, _ = resolve_tokenizer(spec, lambda: [])
    facts = _save_tokenizer(tokenizer, spec, folder)
    byte_lengths = token_byte_lengths(tokenizer)
    files = {split: open_token_file(source / name, facts["vocab_size"]) for split, name in NANOGPT_FILES.items()}
    counts = {split: SplitCounts() for split in NANOGPT_FILES}
    # Where one id stands for the unknown and for an end of text, as GPT-2's does, ids alone do not tell which it is.
    unknown, unknown_tokens = list(unknown_ids(tokenizer) - {facts["end_of_text_id"]}), 0
    report(doing="tokens")
    for split, file in files.items():
        if (file.start, file.bytes_per_token) != (0, 2):  # unlike nanoGPT's
            report(note=f"{file.path}: read as {file.bytes_per_token} bytes for every token from byte {file.start} on")
        writer = ShardWriter(folder, split, DTYPES[facts["dtype"]], shard_tokens)
        with contextlib.closing(writer):
            for ids in file.chunks(facts["vocab_size"]):
                unknown_tokens += int(np.isin(ids, unknown).sum())
                writer.append(ids)
                counts[split].documents += int((ids == facts["end_of_text_id"]).sum())
                counts[split].tokens += len(ids)
                counts[split].utf8_bytes += (
                    decoded_bytes(tokenizer, ids) if byte_lengths is None else int(byte_lengths[ids].sum())
                )
                report(tokens=sum(count.tokens for count in counts.values()))
    valid = counts["valid"].tokens
    tokens = valid + counts["train"].tokens
    facts |= _check_shares({"unknown_token_share": unknown_tokens / tokens}, f"tokenizer {spec!r}", report)
    fraction = valid / tokens
    return facts | _counts(counts, None) | {"valid_fraction": fraction, "valid_rule": "nanoGPT's own val.bin"}


# --- what the manifest says -----------------------------------------------------------------------------------------


def _check_shares(shares: dict[str, float], whose: str, report: Report, most: float = MOST_LOST) -> dict[str, float]:
    """Report how much was lost or repeated, refuse too much, and return what the manifest says of it."""
    shares = {name: share for name, share in shares.items() if share}
    for name, share in shares.items():
        what, mend = SHARES[name]
        if mend and share > most:
            raise UserError(f"{whose}: {100 * share:.3g} % {what}; at most {100 * most:g} % is accepted; {mend}")
        report(note=f"{whose}: {100 * share:.3g} % {what}")
    return shares


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, spec: str, folder: Path) -> dict:
    tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
    vocab_size = len(tokenizer)
    largest_id = max(tokenizer.get_vocab().values())
    if largest_id >= vocab_size:
        raise UserError(
            f"tokenizer {spec!r}: has {vocab_size} entries, but ids up to {largest_id}; ids without gaps are expected"
        )
    return {
        "tokenizer": spec,
        "vocab_size": vocab_size,
        "end_of_text_id": end_of_text_id(tokenizer),
        "dtype": "uint16" if vocab_size <= 1 << 16 else "uint32",
    }


def _counts(counts: dict[str, SplitCounts], characters: int | None) -> dict:
    """``{"documents": {"train": n, "valid": n}, "tokens": …, "utf8_bytes": …, "characters": n}``."""
    names = [field.name for field in dataclasses.fields(SplitCounts)]
    per_split = {name: {split: getattr(count, name) for split, count in counts.items()} for name in names}
    return per_split | {"characters": characters}


# --- the screen ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Report]:
    """Progress on stderr; yields ``report(doing=…, tokens=…, note=…)``, each of them optional."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TextColumn("{task.completed:,.0f}"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task("tokens", total=None, rate="")

        def report(doing: str | None = None, tokens: int | None = None, note: str | None = None) -> None:
            if doing is not None:
                progress.reset(task, total=None, description=doing)
            if tokens is not None:
                elapsed = progress.tasks[0].elapsed or 0
                progress.update(task, completed=tokens, rate=f"{tokens / elapsed:,.0f} tokens/s" if elapsed else "")
            if note is not None and not quiet:
                console.print(note, markup=False, soft_wrap=True)

        yield report
