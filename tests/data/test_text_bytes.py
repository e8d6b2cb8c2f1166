"""The bytes that bits per byte is divided by: those of the text, whatever a tokenizer makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import ByT5Tokenizer

from avatarl import UserError
from avatarl.data import PreparedData
from avatarl.data.prepare import prepare
from avatarl.data.tokenizer import encode_texts, encode_with_bytes, open_tokenizer

from ..tokenizers_of_kinds import BYTE_LEVEL, END_OF_TEXT, KINDS, TEXTS, save_tokenizer
from .test_prepare import write_nanogpt


def size_of(text: str) -> int:
    return len(text.encode("utf-8"))


def prepared_texts(kind: str, folder: Path, **settings) -> PreparedData:
    """TEXTS as documents, in small shards."""
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    tokenizer = save_tokenizer(kind, folder / "tokenizer")
    prepare([str(source)], folder / "data", tokenizer=tokenizer, shard_tokens=100, quiet=True, **settings)
    return PreparedData.open(folder / "data")


def drop_kept_bytes(data: PreparedData) -> PreparedData:
    """The folder as versions before wrote it."""
    manifest = json.loads((data.path / "manifest.json").read_text())
    manifest["files"] = {name: record for name, record in manifest["files"].items() if not name.startswith("bytes-")}
    (data.path / "manifest.json").write_text(json.dumps(manifest))
    for path in data.path.glob("bytes-*"):
        path.unlink()
    return PreparedData.open(data.path)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_text(kind: str, tmp_path: Path):
    """Of a whole split, and of each document in it; the end of a text has none."""
    data = prepared_texts(kind, tmp_path, valid_fraction=0.2)
    tokenizer = data.load_tokenizer()
    sizes = dict(zip(map(tuple, encode_texts(tokenizer, TEXTS)), map(size_of, TEXTS), strict=True))
    found = 0
    for split, stream in (("train", data.train), ("valid", data.valid)):
        ids = stream.slice(0, len(stream))
        starts = [0, *(np.flatnonzero(ids == data.end_of_text_id) + 1)]
        of_documents = [sizes[tuple(ids[start : stop - 1])] for start, stop in zip(starts, starts[1:], strict=False)]
        assert of_documents == [
            data.text_bytes(split, start, stop, tokenizer) for start, stop in zip(starts, starts[1:], strict=False)
        ]
        assert sum(of_documents) == data.text_bytes(split, 0, len(ids), tokenizer) == data.manifest["utf8_bytes"][split]
        found += len(of_documents)
    assert found == len(TEXTS)
    assert bool(data.byte_lengths) == (kind not in BYTE_LEVEL)  # twice the disk only where it is needed


@pytest.mark.parametrize("kind", ["byte-level", "NFC", "SentencePiece"])
def test_a_text_that_is_cut_divides_its_bytes(kind: str, tmp_path: Path):
    """One document, its first part such that a token has many bytes there, and its last such that it has few."""
    text = "龍e\u0301" * 400 + "\n" + "to door " * 300
    source, out = tmp_path / "one.txt", tmp_path / "data"
    source.write_text(text)
    tokenizer = save_tokenizer(kind, tmp_path / "tokenizer")
    manifest = prepare([str(source)], out, tokenizer=tokenizer, valid_fraction=0.2, quiet=True)
    data = PreparedData.open(out)
    tail = data.load_tokenizer().decode(data.valid.slice(0, len(data.valid) - 1))
    assert set(tail) <= set("to door ")
    assert manifest["utf8_bytes"]["valid"] == data.text_bytes("valid", 0, len(data.valid), data.load_tokenizer())
    assert manifest["utf8_bytes"]["valid"] == pytest.approx(size_of(tail), abs=1)
    assert sum(manifest["utf8_bytes"].values()) == size_of(text)


def test_each_token_has_its_own_bytes(tmp_path: Path):
    """A character of three byte tokens counts once, and a letter with its accent as it was given."""
    tokenizer = open_tokenizer(save_tokenizer("SentencePiece", tmp_path))
    ((ids, lengths),) = encode_with_bytes(tokenizer, ["The 龍 The"])
    expected = [("▁The", 3), ("▁", 1), ("<0xE9>", 3), ("<0xBE>", 0), ("<0x8D>", 0), ("▁The", 4)]
    assert list(zip(tokenizer.convert_ids_to_tokens(ids), lengths.tolist(), strict=True)) == expected
    assert [ids] == encode_texts(tokenizer, ["The 龍 The"])
    with_accents = open_tokenizer(save_tokenizer("NFC", tmp_path / "nfc"))
    ((_, lengths),) = encode_with_bytes(with_accents, ["e\u0301"])
    assert lengths.sum() == 3
    ((_, nothing),) = encode_with_bytes(with_accents, [""])
    assert nothing.tolist() == []


def test_a_tokenizer_written_in_python_spreads_the_bytes_evenly():
    ((ids, lengths),) = encode_with_bytes(ByT5Tokenizer(), ["漢字ab"])
    assert (len(ids), lengths.tolist()) == (8, [1] * 8)


@pytest.mark.parametrize("kind", ["SentencePiece", "NFC", "unnamed end", "end not special"])
def test_token_files_have_the_bytes_that_they_decode_to(kind: str, tmp_path: Path):
    folder = save_tokenizer(kind, tmp_path / "tokenizer")
    tokenizer = open_tokenizer(folder)
    texts = [text.replace("e\u0301", "é") for text in TEXTS]  # ids do not say how it was written
    ids = [[*document, tokenizer.eos_token_id] for document in encode_texts(tokenizer, texts)]
    source = write_nanogpt(tmp_path / "nano", tmp_path, sum(ids[:30], []), sum(ids[30:], []))
    manifest = prepare([str(source)], tmp_path / "data", tokenizer=folder, quiet=True)
    data = PreparedData.open(tmp_path / "data")
    expected = sum(map(size_of, texts[30:]))
    assert manifest["utf8_bytes"]["valid"] == data.text_bytes("valid", 0, len(data.valid), tokenizer) == expected


def test_a_folder_of_an_older_version_has_them_where_ids_say_them(tmp_path: Path):
    for kind in ("byte-level", "SentencePiece"):
        (tmp_path / kind).mkdir()
        data = prepared_texts(kind, tmp_path / kind)
        older = drop_kept_bytes(data)
        tokenizer, tokens = data.load_tokenizer(), len(data.valid)
        known = data.text_bytes("valid", 1, tokens, tokenizer)
        assert older.text_bytes("valid", 1, tokens, tokenizer) == (known if kind == "byte-level" else None)


def test_kept_bytes_of_other_tokens_are_refused(tmp_path: Path):
    data = prepared_texts("SentencePiece", tmp_path)
    manifest = json.loads((data.path / "manifest.json").read_text())
    del manifest["files"]["bytes-train-00001.bin"]
    (data.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="train has .* tokens, but the bytes of .*; prepare the data anew"):
        PreparedData.open(data.path)


@pytest.mark.parametrize("kind", ["unnamed end", "end not special"])
def test_an_end_of_text_known_by_its_name_is_special(kind: str, tmp_path: Path):
    tokenizer = open_tokenizer(save_tokenizer(kind, tmp_path))
    assert tokenizer.eos_token == END_OF_TEXT
    assert tokenizer.eos_token_id in tokenizer.all_special_ids
    text = f"to{END_OF_TEXT}door"
    (ids,) = encode_texts(tokenizer, [text])
    assert tokenizer.eos_token_id not in ids
    ended = [*ids, tokenizer.eos_token_id]
    assert tokenizer.decode(ended, skip_special_tokens=True) == text
