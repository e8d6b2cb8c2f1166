from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from avatarl.data import corpus, tokenizer
from avatarl.data.tokenizer import (
    encode_texts,
    end_of_text_id,
    open_tokenizer,
    resolve_tokenizer,
    token_byte_lengths,
)
from avatarl.errors import UserError

from ..tokenizers_of_kinds import BYTE_LEVEL, KINDS, TEXTS, save_tokenizer

TEXT = (
    "Once upon a time, there was a time\n\nwhen naïve cafés — 12 of them — didn't exist.\n  Indented!\r\t日本語\n" * 20
)


def trained(spec: str = "bpe:320"):
    return resolve_tokenizer(spec, lambda: [TEXT]).tokenizer


def pieces_of(text: str) -> list[str]:
    return [piece.text for piece in corpus._pieces_of(lambda: [text])]


@pytest.fixture
def openai_folder(tmp_path) -> Path:
    """A tiny tokenizer in OpenAI's two files: 256 bytes, two merges, and the end of a text last, as in GPT-2."""
    alphabet = sorted(token for token in trained("bpe:257").get_vocab() if len(token) == 1)
    entries = [*alphabet, "th", "the", "<|endoftext|>"]
    (tmp_path / "encoder.json").write_text(json.dumps({token: i for i, token in enumerate(entries)}))
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\nt h\nth e\n")
    return tmp_path


def test_a_trained_tokenizer_reloads_and_encodes_identically(tmp_path):
    tokenizer = trained()
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert len(again) == len(tokenizer) == 320
    assert encode_texts(again, [TEXT]) == encode_texts(tokenizer, [TEXT])
    assert again.decode(encode_texts(again, [TEXT])[0]) == TEXT
    assert again.eos_token == again.bos_token == again.unk_token == "<|endoftext|>"


def test_training_is_deterministic():
    assert trained().backend_tokenizer.to_str() == trained().backend_tokenizer.to_str()


def test_a_text_too_small_for_the_size_says_so():
    assert resolve_tokenizer("bpe:300", lambda: [TEXT]).note is None
    tokenizer, note = resolve_tokenizer("bpe:5000", lambda: ["short short short"])
    assert 257 < len(tokenizer) < 300
    assert note == f"the text supports {len(tokenizer)} tokenizer entries, fewer than the 5000 asked for"


def test_long_words_are_cut_to_train_on_and_nowhere_else(monkeypatch):
    """The trainer's time grows with the square of a word's length."""
    longest = {}
    for limit in (4, tokenizer.LONGEST_WORD_BYTES):
        monkeypatch.setattr(tokenizer, "LONGEST_WORD_BYTES", limit)
        found = resolve_tokenizer("bpe:400", lambda: ["abcdefgh 漢字漢字 ------\n" * 50]).tokenizer
        longest[limit] = max(len(token) for token in found.get_vocab() if token != "<|endoftext|>")
        assert "FixedLength" not in found.backend_tokenizer.to_str()
    assert longest[4] == 4 and longest[tokenizer.LONGEST_WORD_BYTES] > 8, longest


@pytest.mark.parametrize("spec", ["bpe:256", "bpe:", "bpe:many", "bpe:-5", "bpe:1e4"])
def test_a_size_that_cannot_hold_all_bytes_is_refused(spec):
    with pytest.raises(UserError, match=f"tokenizer '{spec}': N of bpe:N must be a whole number of at least 257"):
        resolve_tokenizer(spec, lambda: [TEXT])


def test_an_end_of_text_spelled_out_in_a_text_stays_text():
    tokenizer = trained()
    text = "one<|endoftext|>two <|endoftext|>"
    (ids,) = encode_texts(tokenizer, [text])
    assert end_of_text_id(tokenizer) not in ids
    assert tokenizer.decode(ids) == text


def test_truncation_and_padding_saved_with_a_tokenizer_are_not_applied():
    tokenizer = trained()
    expected = encode_texts(tokenizer, ["a", TEXT])
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    assert encode_texts(tokenizer, ["a", TEXT]) == expected


def test_pieces_give_the_tokens_of_the_whole(monkeypatch):
    monkeypatch.setattr(corpus, "PIECE_CHARACTERS", 20)
    tokenizer = trained()
    draw = random.Random(0)
    parts = [
        "word",
        "Time",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "12",
        "...",
        "'s",
        "é",
        "日本",
        "\u00a0",
        "\u2028",
        "\x1c",
        " a",
        "\r",
    ]
    for _ in range(200):
        text = "".join(draw.choices(parts, k=200))
        pieces = pieces_of(text)
        assert len(pieces) > 3
        assert sum(encode_texts(tokenizer, pieces), []) == encode_texts(tokenizer, [text])[0], repr(text)


def test_cutting_anywhere_would_change_tokens():
    tokenizer = trained()
    text = "time\n\nwhen"
    (whole,) = encode_texts(tokenizer, [text])
    assert sum(encode_texts(tokenizer, ["ti", "me\n\nwhen"]), []) != whole


def test_byte_lengths_add_up_to_the_text():
    tokenizer = trained()
    lengths = token_byte_lengths(tokenizer)
    (ids,) = encode_texts(tokenizer, [TEXT])
    assert lengths.shape == (len(tokenizer),)
    assert lengths.dtype == np.int64
    assert lengths[ids].sum() == len(TEXT.encode("utf-8"))
    assert lengths[end_of_text_id(tokenizer)] == 0
    assert (np.delete(lengths, end_of_text_id(tokenizer)) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_only_tokenizers_that_write_every_byte_have_byte_lengths(kind: str, tmp_path: Path):
    """Elsewhere no length of a token adds up to a text: it depends on the neighbours, or on what was given."""
    tokenizer = open_tokenizer(save_tokenizer(kind, tmp_path))
    lengths = token_byte_lengths(tokenizer)
    assert (lengths is not None) == (kind in BYTE_LEVEL)
    if lengths is not None:
        assert lengths[sum(encode_texts(tokenizer, TEXTS), [])].sum() == sum(len(text.encode()) for text in TEXTS)
        assert lengths[end_of_text_id(tokenizer)] == 0


def test_openai_file_names_are_read(openai_folder):
    tokenizer = resolve_tokenizer(str(openai_folder), lambda: []).tokenizer
    assert len(tokenizer) == 259
    assert end_of_text_id(tokenizer) == 258
    assert tokenizer.convert_ids_to_tokens(encode_texts(tokenizer, ["the thin"])[0]) == ["the", "Ġ", "th", "i", "n"]


def test_broken_openai_files_are_named(openai_folder):
    (openai_folder / "vocab.bpe").write_text("#version: 0.2\nt nowhere\n")
    with pytest.raises(UserError, match="encoder.json and vocab.bpe do not make a tokenizer"):
        resolve_tokenizer(str(openai_folder), lambda: [])
    (openai_folder / "vocab.bpe").write_text("#version: 0.2\n")
    entries = json.loads((openai_folder / "encoder.json").read_text())
    del entries["<|endoftext|>"]
    (openai_folder / "encoder.json").write_text(json.dumps(entries))
    with pytest.raises(UserError, match=r"encoder.json has no '<\|endoftext\|>'"):
        resolve_tokenizer(str(openai_folder), lambda: [])


def test_a_folder_of_transformers_is_opened(tmp_path):
    trained().save_pretrained(tmp_path)
    assert len(resolve_tokenizer(str(tmp_path), lambda: []).tokenizer) == 320


def test_code_that_comes_with_a_tokenizer_is_not_run(tmp_path):
    config = {"tokenizer_class": "Custom", "auto_map": {"AutoTokenizer": ["custom.Custom", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "custom.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Custom: pass\n")
    with pytest.raises(UserError, match="cannot be opened"):
        resolve_tokenizer(str(tmp_path), lambda: [])
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere': no such folder; accepted are bpe:N, gpt2"):
        resolve_tokenizer(str(tmp_path / "nowhere"), lambda: [])
    with pytest.raises(UserError, match=r"cannot be opened .*; accepted are bpe:N, gpt2") as caught:
        resolve_tokenizer(str(tmp_path), lambda: [])
    assert "\n" not in str(caught.value)


def test_gpt2_out_of_reach_tells_how_to_give_a_folder(monkeypatch):
    def unreachable(name, **_):
        raise OSError("no network")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(UserError, match="tokenizer 'gpt2': .*; give a folder that holds GPT-2's encoder.json"):
        resolve_tokenizer("gpt2", lambda: [])


@pytest.mark.skipif("AVATARL_SHARED_DATA" not in os.environ, reason="AVATARL_SHARED_DATA names no folder with GPT-2")
def test_gpt2_gives_the_ids_of_openwebtext():
    shared = Path(os.environ["AVATARL_SHARED_DATA"])
    tokenizer = resolve_tokenizer(str(shared / "gpt2"), lambda: []).tokenizer
    ids = np.fromfile(shared / "openwebtext_sample.bin", dtype="<u2")
    documents = np.split(ids, np.flatnonzero(ids == end_of_text_id(tokenizer)) + 1)[:100]
    texts = [tokenizer.decode(document[:-1]) for document in documents]
    assert encode_texts(tokenizer, texts) == [document[:-1].tolist() for document in documents]
