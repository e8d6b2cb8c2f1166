from __future__ import annotations

import json
import shutil

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from avatarl.data import PreparedData, fidelity, prepare
from avatarl.data.fidelity import Fidelity
from avatarl.data.tokenizer import encode_texts
from avatarl.errors import UserError

from .conftest import story

ENGLISH = "".join(story(number) for number in range(30))
RUSSIAN = "Старый дом стоит над тихой рекой. Утром свет падает на дверь.\n" * 30


def word_level(**names) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator([ENGLISH], trainers.WordLevelTrainer(special_tokens=["[UNK]", "[EOS]"]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def dropping(normalizer=None) -> PreTrainedTokenizerFast:
    """Characters that it has no entries for vanish: it has neither an unknown token nor bytes."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    backend.train_from_iterator([ENGLISH], trainers.BpeTrainer(vocab_size=200, special_tokens=["</s>"]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def shares_of(tokenizer, *texts: str) -> tuple[float, float]:
    """The shares of unknown tokens and of lost characters."""
    measured = Fidelity(tokenizer)
    for text, ids in zip(texts, encode_texts(tokenizer, list(texts)), strict=True):
        measured.add(text, ids)
    return tuple(measured.shares().values())


def test_what_is_unknown_or_lost_is_counted(prepared):
    named, unnamed = word_level(unk_token="[UNK]", eos_token="[EOS]"), word_level()
    ends_with_unknown = word_level(unk_token="[UNK]", eos_token="[UNK]")
    for tokenizer in (named, unnamed, ends_with_unknown):
        assert shares_of(tokenizer, "the fox") == (0, 0)
        assert shares_of(tokenizer, "the лиса fox", "the fox") == (1 / 5, 4 / 16)
    assert shares_of(dropping(), "the лиса fox") == (0, 4 / 10)
    byte_level = prepared.load_tokenizer()
    assert byte_level.unk_token == byte_level.eos_token
    assert shares_of(byte_level, "the лиса fox 🦊", "<|endoftext|>") == (0, 0)


def test_what_normalisers_change_is_not_lost():
    bert = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    assert shares_of(dropping(bert), "The  QUICK\tbrown fóx\n\x00", "ÀGED ówls") == (0, 0)
    assert shares_of(dropping(normalizers.NFKC()), "the ｆｏｘ oﬀ") == (0, 0)
    cutting = normalizers.Replace("fox", "")
    assert shares_of(dropping(cutting), "the fox") == (0, 3 / 6)


def test_a_long_text_is_looked_at_in_parts_that_lie_spread(monkeypatch):
    monkeypatch.setattr(fidelity, "DECODED_CHARACTERS", 100)
    texts = ["the quick brown fox"] * 500 + ["лиса"] * 500
    measured = Fidelity(dropping())
    for text, ids in zip(texts, encode_texts(dropping(), texts), strict=True):
        measured.add(text, ids)
    assert 0 < measured._decoded < 1000
    assert measured.shares()["lost_character_share"] > 0.05


@pytest.mark.parametrize(
    ("tokenizer", "name", "what"),
    [
        (word_level(unk_token="[UNK]", eos_token="[EOS]"), "unknown_token_share", "of the tokens are unknown"),
        (dropping(), "lost_character_share", "of the characters are lost"),
    ],
    ids=["unknown", "lost"],
)
def test_a_tokenizer_that_leaves_little_of_a_text_is_refused(tmp_path, tokenizer, name, what, capfd):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    spec = str(tmp_path / "tokenizer")
    (tmp_path / "ru.txt").write_text(RUSSIAN, encoding="utf-8")
    with pytest.raises(UserError, match=f"tokenizer '{spec}': [89].* % {what}.*; at most 50 % is accepted; give"):
        prepare([str(tmp_path / "ru.txt")], tmp_path / "out", tokenizer=spec, quiet=True)
    assert not (tmp_path / "out").exists()

    (tmp_path / "mixed.txt").write_text(ENGLISH + RUSSIAN[:1000], encoding="utf-8")
    manifest = prepare([str(tmp_path / "mixed.txt")], tmp_path / "out", tokenizer=spec)
    assert 0 < manifest[name] < 0.2
    assert f"tokenizer '{spec}': {100 * manifest[name]:.3g} % {what}" in capfd.readouterr().err


def test_a_class_that_is_wrong_for_its_file_is_refused(tmp_path, prepared, stories_file):
    folder = tmp_path / "bert"
    shutil.copytree(prepared.path / "tokenizer", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "BertTokenizerFast"}))
    with pytest.raises(UserError, match="of the tokens are unknown to the tokenizer"):
        prepare([str(stories_file)], tmp_path / "out", tokenizer=str(folder), quiet=True)


def test_unknown_tokens_in_nanogpts_files_are_counted(tmp_path):
    import numpy as np

    source = tmp_path / "nano"
    source.mkdir()
    for number, names in enumerate([{"eos_token": "[EOS]"}, {"eos_token": "[UNK]"}]):
        word_level(unk_token="[UNK]", **names).save_pretrained(tmp_path / f"{number}")
        np.array([0, 2, 3, 4] * 5, dtype="<u2").tofile(source / "train.bin")
        np.array([2, 3, 4, 1], dtype="<u2").tofile(source / "val.bin")
        manifest = prepare([str(source)], tmp_path / f"out{number}", tokenizer=str(tmp_path / f"{number}"), quiet=True)
        # Where the unknown token ends texts, its ids may well be ends.
        assert manifest.get("unknown_token_share") == (5 / 24, None)[number]
    np.array([0, 0, 0, 3] * 5, dtype="<u2").tofile(source / "train.bin")
    with pytest.raises(UserError, match="62.5 % of the tokens are unknown"):
        prepare([str(source)], tmp_path / "out", tokenizer=str(tmp_path / "0"), quiet=True)


# --- documents that repeat ------------------------------------------------------------------------------------------


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_documents_that_repeat_are_counted_whatever_surrounds_them(tmp_path, prepared, capfd):
    texts = [f"{story(number)}" for number in range(40)]
    copies = [f" \n{text.strip()}\n\n" for text in texts[:5]]
    a, b = write(tmp_path / "a.jsonl", texts), write(tmp_path / "b.jsonl", copies)
    manifest = prepare([a, b], tmp_path / "out", tokenizer=str(prepared.path / "tokenizer"))
    lengths = [len(text.strip()) for text in texts]
    assert manifest["repeated_share"] == pytest.approx(sum(lengths[:5]) / (sum(lengths) + sum(lengths[:5])))
    assert f"{100 * manifest['repeated_share']:.3g} % of the text repeats earlier documents" in capfd.readouterr().err


def test_the_share_of_validation_that_is_trained_on_is_counted(tmp_path, prepared):
    tokenizer = str(prepared.path / "tokenizer")
    texts = [story(number) for number in range(40)]
    prepare([write(tmp_path / "a.jsonl", texts)], tmp_path / "a", tokenizer=tokenizer, valid_fraction=0.2, quiet=True)
    from .test_prepare import split_documents

    valid = split_documents(PreparedData.open(tmp_path / "a"), "valid")
    assert len(valid) > 3
    added = [valid[0], "something else"]
    sources = [write(tmp_path / "b.jsonl", texts + added)]
    manifest = prepare(sources, tmp_path / "b", tokenizer=tokenizer, valid_fraction=0.2, quiet=True)
    data = PreparedData.open(tmp_path / "b")
    in_train = set(split_documents(data, "train"))
    sizes = {text: len(text.strip()) for text in split_documents(data, "valid")}
    expected = sum(size for text, size in sizes.items() if text in in_train) / sum(sizes.values())
    assert 0 < expected < 0.5 and manifest["repeated_share_of_valid"] == pytest.approx(expected)


@pytest.mark.parametrize("count", [1, 3, 40])
def test_a_copy_of_the_text_is_refused(tmp_path, prepared, count):
    texts = [story(number) for number in range(count)]
    a, b = write(tmp_path / "a.jsonl", texts), write(tmp_path / "b.jsonl", texts)
    with pytest.raises(UserError, match=r"sources: .* % of the validation text is trained on as well; at most 50 %"):
        prepare([a, b], tmp_path / "out", tokenizer=str(prepared.path / "tokenizer"), quiet=True)
    assert not (tmp_path / "out").exists()


def test_what_one_source_repeats_is_its_own(tmp_path, prepared, capfd):
    source = write(tmp_path / "a.jsonl", [story(1)] * 30)
    manifest = prepare([source], tmp_path / "out", tokenizer=str(prepared.path / "tokenizer"))
    assert manifest["repeated_share"] == pytest.approx(29 / 30) and manifest["repeated_share_of_valid"] == 1
    assert "sources: 100 % of the validation text is trained on as well" in capfd.readouterr().err
