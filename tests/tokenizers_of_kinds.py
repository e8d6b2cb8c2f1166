"""Tokenizers of many kinds, tiny, and texts that most of them change before or while they cut them."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    f"The {word}  walked\nto cafe\u0301 {number}, 漢字 {word.upper()} İ ﬁne 🙂 {'x' * number}\tdon't!"
    for number, word in enumerate("fox owl tree river stone wind door light bird rain".split() * 4)
]
END_OF_TEXT, END = "<|endoftext|>", "</s>"


def _trained(backend: Tokenizer, trainer: type, **settings) -> Tokenizer:
    backend.train_from_iterator(TEXTS, trainer(show_progress=False, **settings))
    return backend


def _sentencepiece() -> Tokenizer:
    """As Llama's: a mark for a space, and the bytes of what it has no entry for."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    special = ["<unk>", END, *(f"<0x{byte:02X}>" for byte in range(256))]
    _trained(backend, trainers.BpeTrainer, vocab_size=400, special_tokens=special)
    state = json.loads(backend.to_str())
    state["added_tokens"] = state["added_tokens"][:2]  # the bytes are ordinary entries
    return Tokenizer.from_str(json.dumps(state))


def _word_piece() -> Tokenizer:
    """As BERT's: lower case, no accents, no white space."""
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return _trained(backend, trainers.WordPieceTrainer, vocab_size=150, special_tokens=["<unk>", END])


def _word_level() -> Tokenizer:
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return _trained(backend, trainers.WordLevelTrainer, vocab_size=90, special_tokens=["<unk>", END])


def _unigram() -> Tokenizer:
    """As T5's."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    settings = dict(vocab_size=120, special_tokens=["<unk>", END], unk_token="<unk>")
    return _trained(backend, trainers.UnigramTrainer, **settings)


def _byte_level(normalizer=None, add_prefix_space: bool = False) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(
        backend, trainers.BpeTrainer, vocab_size=330, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet
    )


def _not_special() -> Tokenizer:
    """An end of text that nothing but its name tells from other entries."""
    state = json.loads(_byte_level().to_str())
    state["added_tokens"][0]["special"] = False
    return Tokenizer.from_str(json.dumps(state))


ENDED = {"eos_token": END_OF_TEXT}
OTHERS = {"eos_token": END, "unk_token": "<unk>"}
KINDS = {
    "byte-level": (_byte_level, ENDED),
    "no normaliser": (lambda: _byte_level(normalizers.Sequence([])), ENDED),  # DeepSeek's
    "unnamed end": (_byte_level, {}),
    "end not special": (_not_special, {}),
    "NFC": (lambda: _byte_level(normalizers.NFC()), ENDED),  # Qwen's and NeoX's
    "lower case": (lambda: _byte_level(normalizers.Lowercase()), ENDED),
    "prefix space": (lambda: _byte_level(add_prefix_space=True), ENDED),
    "SentencePiece": (_sentencepiece, OTHERS),
    "WordPiece": (_word_piece, OTHERS),
    "WordLevel": (_word_level, OTHERS),
    "Unigram": (_unigram, OTHERS),
}
BYTE_LEVEL = ("byte-level", "no normaliser", "unnamed end", "end not special")


def save_tokenizer(kind: str, folder: Path) -> str:
    """Write a tokenizer of a kind as a folder; return its name."""
    make, names = KINDS[kind]
    PreTrainedTokenizerFast(tokenizer_object=make(), **names).save_pretrained(folder)
    return str(folder)
