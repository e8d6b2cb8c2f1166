"""Where text comes from: files, folders, Hugging Face data sets and Python's own documentation.

Everything streams. A document may be larger than memory, so it comes in pieces.
"""

from __future__ import annotations

import codecs
import gzip
import io
import itertools
import json
import os
import re
import reprlib
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, closing
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

from avatarl.data.folders import NAMED_TWICE, files_in, identity
from avatarl.data.python_docs import python_documents
from avatarl.data.readers import Part, Piece, read_parts
from avatarl.errors import UserError, nearest_name
from avatarl.hub import require_on_hub
from avatarl.untrusted import Allowance, Unpacking, refusing

if TYPE_CHECKING:
    from datasets import IterableDataset

SEPARATOR = "<|endoftext|>"
SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
ACCEPTED = f"{', '.join(SUFFIXES)}, each also with .gz"

PIECE_CHARACTERS = 1 << 16
LONGEST_PIECE_CHARACTERS = 1 << 20
ROW_BYTES = 64  # what a row takes besides its text: a file can hold any number of empty ones
LONGEST_JSON_LINE = 1 << 28  # a record is held in memory, and a small gzip file can hold an endless one

# Places where a document can be cut without changing its tokens: before a single space and after a single line
# feed, with something visible on both sides. The pre-tokenizers of GPT-2, GPT-4, Llama 3 and Qwen all end a word
# there. Beside a run of spaces or line feeds they disagree. The leading `.*` is greedy, so the last seam is found.
LAST_SEAM = re.compile(r"(?s:.*)(?:\S(?= \S)|\S\n(?=\S))")
NUL, NOT_UTF8 = re.compile("\0"), re.compile("[\udc80-\udcff]")  # the latter as `surrogateescape` decodes it


def document_pieces(
    sources: Iterable[str],
    text_field: str = "text",
    processes: int = 1,
    folder: Path | None = None,
    left_out: dict[str, Counter[str]] | None = None,
) -> Iterator[Piece]:
    """Yield the documents of all sources, in order, as pieces of about 65,536 characters.

    Documents of nothing but white space are left out. What is named twice, under whatever names, is read once.
    Close the iterator to end the processes.

    Tokenizing the pieces one by one gives the tokens of the whole document with byte-level tokenizers, unless
    1,048,576 characters pass without a place to cut; then the cut is made anywhere. Tokenizers that put a mark before
    every text (SentencePiece's) put it before every piece.

    Args:
        sources: Files or folders (.txt .md .jsonl .parquet, and .gz of these), ``python-docs``, and ``hub:ID`` or
            ``hub:ID@CONFIG`` for the train split of a data set that the ``datasets`` library opens.
        text_field: The field or column of structured sources that holds the text.
        processes: How many read at once, each a file or a shard of a data set; see :func:`.readers.read_parts`.
        folder: Where several processes keep what they have read ahead.
        left_out: Filled, before the first piece, with the number of files not read, by source and reason.

    Raises:
        UserError: A source is missing, empty, of an unknown kind, or holds something that is not text.
    """
    parts: list[tuple[str, list[Part]]] = []
    reasons: dict[str, Counter[str]] = {}
    named: set[Hashable] = set()
    for source in sources:
        counts = reasons.setdefault(source, Counter())
        found = _parts(source, text_field, counts)
        own = {key: part for key, part in found if key not in named}
        counts[NAMED_TWICE] += len(found) - len(own)
        named.update(own)
        parts.append((source, list(own.values())))
    if left_out is not None:
        left_out.update({source: +counts for source, counts in reasons.items() if +counts})
    with closing(read_parts([part for _, own in parts for part in own], processes, folder)) as read:
        for source, own in parts:
            is_empty = bool(own)
            for piece in itertools.chain.from_iterable(itertools.islice(read, len(own))):
                is_empty = False
                yield piece
            if is_empty:
                raise UserError(f"source {source!r}: holds no text")


def _parts(source: str, text_field: str, left_out: Counter[str]) -> list[tuple[Hashable, Part]]:
    """The files of a source, or the shards of a data set, each behind a key that all its names share."""
    if source == "python-docs":
        return [(source, partial(_pieces_of, python_documents))]
    if not source.startswith("hub:"):
        return [(identity(path), partial(_file_pieces, path, text_field)) for path in _files(source, left_out)]
    shards = _hub_shards(source)
    name = hub_name(source)[0]
    data_set = os.path.realpath(name) if os.path.isdir(name) else name, shards.info.config_name
    return [
        ((*data_set, number), partial(_pieces_of, partial(_hub_documents, shards, number, source, text_field)))
        for number in range(shards.num_shards)
    ]


def _files(source: str, left_out: Counter[str]) -> list[Path]:
    """The readable files that a path names, sorted."""
    path = Path(source)
    if os.path.isfile(path):
        if _suffix(path) is None:
            raise UserError(f"source {source!r}: unknown suffix {path.suffix!r}; accepted are {ACCEPTED}")
        return [path]
    if not os.path.isdir(path):
        raise UserError(
            f"source {source!r}: no such file or folder; accepted are files and folders ({ACCEPTED}), python-docs, "
            "hub:DATASET_ID and a folder with nanoGPT's train.bin and val.bin"
        )
    found, counts = files_in(path)
    left_out.update(counts)
    readable = [file for file in found if _suffix(file)]
    for file in found:
        if not _suffix(file):
            left_out["of an unknown kind" if os.path.exists(file) else "links to nowhere"] += 1
        elif not file.is_file():  # reading a pipe would wait
            raise UserError(f"source {source!r}: {file} is not a regular file that exists")
    if not readable:
        raise UserError(f"source {source!r}: the folder has no readable file; accepted are {ACCEPTED}")
    return readable


def _suffix(path: Path) -> str | None:
    """The suffix that says how to read a file, without ``.gz``; None for a file that we cannot read."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def _file_pieces(path: Path, text_field: str) -> Iterator[Piece]:
    documents = {".jsonl": _jsonl_documents, ".parquet": _parquet_documents}.get(_suffix(path))
    is_packed = path.name.lower().endswith(".gz")
    try:
        with gzip.open(path) if is_packed else path.open("rb") as stream:
            if is_packed:
                stream = io.BufferedReader(Unpacking(stream, path))
            if documents is None:
                yield from _text_pieces(stream, path)
            else:
                yield from _pieces_of(partial(documents, stream, path, text_field))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: corrupt gzip file ({error}); a whole gzip file is expected") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


# --- pieces ---------------------------------------------------------------------------------------------------------


def _pieces_of(documents: Part) -> Iterator[Piece]:
    for text in documents():
        if text and not text.isspace():
            starts = range(0, len(text), PIECE_CHARACTERS)
            yield from _pieces(text[start : start + PIECE_CHARACTERS] for start in starts)


def _pieces(fragments: Iterable[str]) -> Iterator[Piece]:
    """Join one document's fragments, cut anywhere, into pieces that are cut where it does no harm."""
    held: list[str] = []
    held_characters, searched = 0, None
    for fragment in fragments:
        held.append(fragment)
        held_characters += len(fragment)
        if held_characters <= PIECE_CHARACTERS:
            continue
        # A seam takes three characters, so that only the last two of what was searched before are looked at again.
        recent = "".join(held) if searched is None else searched[-2:] + fragment
        seam = LAST_SEAM.match(recent)
        if seam is None and held_characters <= LONGEST_PIECE_CHARACTERS:
            searched = recent
            continue
        # Something is always kept back, so that the last piece of a document, known only at its end, is not empty.
        cut = held_characters - 1 if seam is None else held_characters - len(recent) + seam.end()
        text = "".join(held)
        yield Piece(text[:cut], ends_document=False)
        held, held_characters, searched = [text[cut:]], len(text) - cut, None
    if held:
        yield Piece("".join(held), ends_document=True)


# --- plain text -----------------------------------------------------------------------------------------------------


def _text_pieces(stream: IO[bytes], path: Path) -> Iterator[Piece]:
    for is_separator, lines in itertools.groupby(_lines(stream, path), key=lambda line: line is None):
        if not is_separator:
            yield from _pieces(itertools.dropwhile(str.isspace, lines))


def _lines(stream: IO[bytes], path: Path) -> Iterator[str | None]:
    """Lines with their line ends, long ones in parts; ``None`` for a line that separates documents."""
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="\n")
    offset, at_line_start = 0, True
    while raw := text.readline(PIECE_CHARACTERS):
        # The size limit may have fallen between a carriage return and its line feed.
        while raw.endswith("\r") and (following := text.read(1)):
            raw += following
        if wrong := NUL.search(raw) or NOT_UTF8.search(raw):
            place = offset + len(raw[: wrong.start()].encode("utf-8", "surrogateescape"))
            found = (
                f"binary, not text (a NUL byte at byte {place})" if wrong[0] == "\0" else f"not UTF-8 at byte {place}"
            )
            raise UserError(f"{path}: {found}; UTF-8 text is expected")
        line = (raw if offset else raw.removeprefix("\ufeff")).replace("\r\n", "\n")
        if at_line_start and line.removesuffix("\n") == SEPARATOR:
            yield None
        elif line:
            yield line
        at_line_start = raw.endswith("\n")
        offset += len(raw.encode("utf-8"))


# --- records: JSON lines, Parquet, the Hub --------------------------------------------------------------------------


def _jsonl_documents(stream: IO[bytes], path: Path, text_field: str) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: stream.readline(LONGEST_JSON_LINE + 1), b""), start=1):
        where = f"{path}:{number}"
        if len(line) > LONGEST_JSON_LINE:
            raise UserError(f"{where}: the line is longer than {LONGEST_JSON_LINE:,} bytes; one record is expected")
        line = line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"")
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 at byte {error.start} of the line; UTF-8 is expected") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not a JSON line ({error}); one JSON object a line is expected") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: found a JSON {type(record).__name__}; one JSON object a line is expected")
        yield from _text_of(record, text_field, where)


def _parquet_documents(stream: IO[bytes], path: Path, text_field: str) -> Iterator[str]:
    import pyarrow.parquet

    with tempfile.TemporaryFile() as unpacked, refusing(f"{path}: not a readable Parquet file (", ")"):
        if isinstance(stream, io.BufferedReader) and isinstance(stream.raw, Unpacking):
            # Parquet is read from its end, which a gzip stream cannot do without being unpacked again and again.
            shutil.copyfileobj(stream, unpacked)
            stream = unpacked
        table = pyarrow.parquet.ParquetFile(stream)
        _require_field(table.schema_arrow.names, text_field, str(path))
        columns = [table.schema.column(number).path for number in range(len(table.schema))]
        if text_field not in columns:  # it has columns in it
            kind = table.schema_arrow.field(text_field).type
            raise UserError(f"{path}: field {text_field!r} holds {kind}; a string is expected")
        groups = [table.metadata.row_group(number) for number in range(table.num_row_groups)]
        column = columns.index(text_field)
        Allowance(path).spend(sum(group.column(column).total_uncompressed_size for group in groups))
        # As a dictionary, a text is in memory as often as it is in the file, in however many rows it stands.
        table, rows = pyarrow.parquet.ParquetFile(stream, read_dictionary=[text_field]), Allowance(path)
        for batch in table.iter_batches(batch_size=256, columns=[text_field]):
            for text in batch.column(0).to_pylist():
                rows.spend(ROW_BYTES + (len(text) if isinstance(text, str) else 0))
                yield from _text_of({text_field: text}, text_field, str(path))


def _hub_shards(source: str) -> IterableDataset:
    import datasets

    name, config = hub_name(source)
    with _refusing_hub(source):
        if not os.path.isdir(name):
            require_on_hub(name, "dataset", f"source {source!r}")
        return datasets.load_dataset(name, config, split="train", streaming=True)


def hub_name(source: str) -> tuple[str, str | None]:
    """The id or folder of ``hub:ID``, ``hub:ID@CONFIG``, ``hub:FOLDER`` …, and the configuration."""
    whole = source.removeprefix("hub:")
    if os.path.isdir(whole):
        return whole, None
    name, _, config = whole.rpartition("@")
    if not os.path.isdir(name):  # an id, which has no @ in it; a folder's path may
        name, _, config = whole.partition("@")
    return name, config or None


def _hub_documents(shards: IterableDataset, number: int, source: str, text_field: str) -> Iterator[str]:
    with _refusing_hub(source):
        for record in shards.shard(shards.num_shards, number):
            yield from _text_of(record, text_field, f"source {source!r}")


def _refusing_hub(source: str) -> AbstractContextManager:
    expected = "expected is hub:DATASET_ID, hub:DATASET_ID@CONFIG or hub:FOLDER"
    return refusing(f"source {source!r}: the datasets library cannot open its train split (", f"); {expected}")


def _text_of(record: dict, text_field: str, where: str) -> Iterator[str]:
    """The text of one record: none for null, else one string that can be written as UTF-8."""
    _require_field(record, text_field, where)
    text = record[text_field]
    if text is None:
        return
    if not isinstance(text, str):
        raise UserError(f"{where}: field {text_field!r} holds a {type(text).__name__}; a string is expected")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: field {text_field!r} holds half a surrogate pair at character {error.start}; Unicode text is "
            "expected"
        ) from error
    yield text


def _require_field(found: Iterable[str], text_field: str, where: str) -> None:
    names = list(found)
    if text_field not in names:
        fields = reprlib.repr(names)[1:-1] or "none"
        raise UserError(f"{where}: no field {text_field!r}; found {fields}{nearest_name(text_field, names)}")
