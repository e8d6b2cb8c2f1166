"""Tokenizers: trained here, or opened from a folder or the Hub; always a ``transformers`` tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from avatarl.data.growth import PROBE, check_growth
from avatarl.errors import UserError
from avatarl.hub import require_on_hub
from avatarl.untrusted import check_library_folder, refusing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
SMALLEST_BPE = 256 + 1  # every byte, and the end of a text
LARGEST_BPE = 1 << 20  # the trainer makes room for all of them at once
MOST_UNUSED_IDS = 1 << 20

# Training keeps every distinct word in memory; this much text is plenty for merges and keeps that bounded.
BPE_TRAINING_CHARACTERS = 200_000_000

# The trainer's time grows with the square of a word's length, so longer words are cut for it. No ordinary text has so
# many letters, digits, other marks or spaces in a row.
LONGEST_WORD_BYTES = 4096

ACCEPTED = "accepted are bpe:N, gpt2, a tokenizer folder and a tokenizer's id on the Hugging Face Hub"


class ResolvedTokenizer(NamedTuple):
    """A tokenizer, and a note for the user about its training (None where there is nothing to say)."""

    tokenizer: PreTrainedTokenizerBase
    note: str | None = None


def resolve_tokenizer(spec: str, text_pieces: Callable[[], Iterable[str]]) -> ResolvedTokenizer:
    """Train or open the tokenizer that ``spec`` names.

    Args:
        spec: ``bpe:N`` trains a byte-level BPE of N entries on the text; ``gpt2`` is GPT-2's from the Hub; a folder is
            one that ``AutoTokenizer`` opens or that holds OpenAI's ``encoder.json`` and ``vocab.bpe``; anything else
            is an id on the Hub. Code that comes with a tokenizer is never run.
        text_pieces: Called to read the text, only to train a tokenizer on it.

    Raises:
        UserError: ``spec`` names no tokenizer that can be trained or opened.
    """
    if spec.startswith("bpe:"):
        return _train_bpe(_bpe_size(spec), text_pieces())
    if spec == "gpt2":
        return ResolvedTokenizer(_open_gpt2())
    if all(os.path.isfile(Path(spec, name)) for name in ("encoder.json", "vocab.bpe")):
        return ResolvedTokenizer(_open_openai_folder(Path(spec)))
    if not spec or (spec.startswith((".", "/", "~")) and not os.path.isdir(spec)):
        raise UserError(f"tokenizer {spec!r}: no such folder; {ACCEPTED}")
    with refusing(f"tokenizer {spec!r}: cannot be opened (", f"); {ACCEPTED}"):
        return ResolvedTokenizer(open_tokenizer(spec))


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Encode each text on all cores, adding nothing and cutting nothing off.

    A special token spelled out in a text is text: it is encoded letter by letter, so that no document can forge an
    end. Set ``TOKENIZERS_PARALLELISM=false`` to stay on one core.
    """
    with refusing("tokenizer: cannot encode the text (", ")"):
        return _encode(tokenizer, texts)


def encode_with_bytes(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[tuple[list[int], np.ndarray]]:
    """Encode each text as :func:`encode_texts` does, with the UTF-8 bytes that each token stands for, int64 (T,).

    These are bytes of the text as given, whatever a normaliser makes of it, and add up to it: what no token covers
    (white space, say) belongs to the next token, or to the last. A tokenizer written in Python does not say where its
    tokens lie; there the bytes are spread evenly.
    """
    with refusing("tokenizer: cannot encode the text (", ")"):
        backend = _backend(tokenizer)
        if backend is not None:
            encodings = backend.encode_batch(texts, add_special_tokens=False)
            return [(each.ids, _bytes_between(each.offsets, text)) for each, text in zip(encodings, texts, strict=True)]
    found = encode_texts(tokenizer, texts)
    sizes = [len(text.encode("utf-8")) for text in texts]
    ends = [np.linspace(0, size, len(ids) + 1).round().astype(np.int64) for ids, size in zip(found, sizes, strict=True)]
    return [(ids, np.diff(each)) for ids, each in zip(found, ends, strict=True)]


def _bytes_between(offsets: Sequence[tuple[int, int]], text: str) -> np.ndarray:
    """UTF-8 bytes (T,) from each token's end to the next one's, of tokens at (start, stop) in characters."""
    ends = np.maximum.accumulate([stop for _, stop in offsets], dtype=np.int64)
    ends[-1:] = len(text)
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)
    return np.diff(np.concatenate([[0], np.cumsum(widths)])[ends], prepend=0)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    backend = _backend(tokenizer)
    if backend is None:
        return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    # The backend is called directly because it can then leave out character offsets, which nearly halves the time.
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """The Rust tokenizer, set to encode a text as it is; None for a tokenizer written in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # `transformers` sets these three anew on each call of its own, so nothing is lost by changing them.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
    return backend


def end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that ends a document: the tokenizer's end-of-sequence token, else ``<|endoftext|>`` if it has one."""
    if tokenizer.eos_token_id is not None:
        return tokenizer.eos_token_id
    return tokenizer.get_vocab().get(END_OF_TEXT)


def token_byte_lengths(tokenizer: PreTrainedTokenizerBase) -> np.ndarray | None:
    """Bytes of text that each id stands for, int64 (V,), V = ``len(tokenizer)``; 0 for special tokens and unused ids.

    The lengths of a text's tokens add up to its UTF-8 bytes. None for a tokenizer of which that is not true: it is not
    byte-level, or it changes a text before it cuts it, or leaves some of it out.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend else None
    vocabulary = tokenizer.get_vocab()
    if state is None or not _keeps_every_byte(state, vocabulary):
        return None
    literal = {entry["content"]: len(entry["content"].encode("utf-8")) for entry in state["added_tokens"]}
    special = {entry["id"] for entry in state["added_tokens"] if entry["special"]}
    special |= {*tokenizer.all_special_ids, end_of_text_id(tokenizer)}
    lengths = np.zeros(len(tokenizer), dtype=np.int64)
    for token, token_id in vocabulary.items():
        if token_id < len(lengths) and token_id not in special:
            lengths[token_id] = literal.get(token, len(token))  # that alphabet writes every byte as one character
    return lengths


def decoded_bytes(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray) -> int:
    """UTF-8 bytes of the text that ids (T,) decode to, document by document; special tokens have none."""
    documents = np.split(ids, np.flatnonzero(ids == end_of_text_id(tokenizer)))
    texts = (
        tokenizer.decode(document.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for document in documents
    )
    return sum(len(text.encode("utf-8")) for text in texts)


def _keeps_every_byte(state: dict, vocabulary: dict[str, int]) -> bool:
    """Whether a tokenizer, as its tokenizer.json has it, writes a text byte for byte in the byte-level alphabet."""
    normalizer, decoder, first = (state[name] or {} for name in ("normalizer", "decoder", "pre_tokenizer"))
    steps = [first, *first.get("pretokenizers", [])]
    return (
        any(part.get("type") == "ByteLevel" for part in [decoder, *decoder.get("decoders", [])])
        and any(step.get("type") == "ByteLevel" for step in steps)
        and vocabulary.keys() >= set(pre_tokenizers.ByteLevel.alphabet())
        and not normalizer.get("normalizers", normalizer)
        and not any(step.get("add_prefix_space") or step.get("behavior") == "Removed" for step in steps)
        and not any(state["model"].get(mark) for mark in ("continuing_subword_prefix", "end_of_word_suffix"))
        and not any(entry["lstrip"] or entry["rstrip"] for entry in state["added_tokens"] if not entry["special"])
    )


# --- training -------------------------------------------------------------------------------------------------------


def _bpe_size(spec: str) -> int:
    size = spec.removeprefix("bpe:")
    # Python refuses to read a number of thousands of digits.
    if not (size.isascii() and size.isdigit() and len(size) < 20 and SMALLEST_BPE <= int(size) <= LARGEST_BPE):
        raise UserError(
            f"tokenizer {spec!r}: N of bpe:N must be a whole number of at least {SMALLEST_BPE} "
            f"(256 bytes and {END_OF_TEXT}) and at most {LARGEST_BPE}"
        )
    return int(size)


def _train_bpe(size: int, text_pieces: Iterable[str]) -> ResolvedTokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend = _byte_level(BPE())
    words = backend.pre_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(LONGEST_WORD_BYTES)])
    backend.train_from_iterator(_first_characters(text_pieces, BPE_TRAINING_CHARACTERS), trainer)
    backend.pre_tokenizer = words
    trained, note = backend.get_vocab_size(), None
    if trained < size:
        note = f"the text supports {trained} tokenizer entries, fewer than the {size} asked for"
    return ResolvedTokenizer(_wrapped(backend), note)


def _first_characters(text_pieces: Iterable[str], limit: int) -> Iterator[str]:
    total = 0
    for text in text_pieces:
        yield text[: limit - total]
        total += len(text)
        if total >= limit:
            return


def _byte_level(model: BPE) -> Tokenizer:
    """GPT-2's way of cutting text into words and words into bytes, around a BPE model."""
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _wrapped(backend: Tokenizer) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


# --- opening --------------------------------------------------------------------------------------------------------


def open_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """Open a tokenizer folder or a Hub id, and try it on a few words.

    Raises:
        Exception: Of many kinds, Rust's panics among them; callers use :func:`avatarl.untrusted.refusing`.
    """
    from transformers import AutoTokenizer

    if os.path.isdir(name):
        check_library_folder(Path(name))
        check_growth(Path(name))
    else:
        require_on_hub(str(name), "model")
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    _try_out(tokenizer, str(name))
    if tokenizer.eos_token_id is None and end_of_text_id(tokenizer) is not None:
        # Known by its name alone, it would be text to whoever leaves out special tokens.
        tokenizer.add_special_tokens({"eos_token": END_OF_TEXT})
    return tokenizer


def _try_out(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a tokenizer that opens but cannot encode and decode a text; `prepare` measures what it loses."""
    ids = set(tokenizer.get_vocab().values())
    _check_ids(ids, name)
    (encoded,) = _encode(tokenizer, [PROBE])
    if not set(encoded) <= ids:
        raise UserError(f"{name}: the tokenizer gives ids that it has no entries for")
    tokenizer.decode(encoded)
    _ = tokenizer.all_special_ids  # looked up through one another: in circles, if the file says so
    if end_of_text_id(tokenizer) not in {None, *ids}:
        raise UserError(f"{name}: the end-of-text token is not an entry of the tokenizer")


def _check_ids(ids: Iterable[int], name: str) -> None:
    """Refuse ids so large that the library, which writes a tokenizer id by id, would fill the memory."""
    count, largest = len(set(ids)), max(ids, default=0)
    if not count:
        raise UserError(f"{name}: the tokenizer has no entries")
    if largest >= count + MOST_UNUSED_IDS:
        raise UserError(f"{name}: the tokenizer has {count} entries, but an id of {largest}")


def _open_gpt2() -> PreTrainedTokenizerBase:
    try:
        return open_tokenizer("openai-community/gpt2")
    except Exception as error:
        raise UserError(
            "tokenizer 'gpt2': openai-community/gpt2 cannot be had from the Hugging Face Hub or its local cache; give "
            "a folder that holds GPT-2's encoder.json and vocab.bpe, or its tokenizer.json"
        ) from error


def _open_openai_folder(folder: Path) -> PreTrainedTokenizerBase:
    """GPT-2's tokenizer under the file names that OpenAI published it with."""
    before = f"tokenizer {str(folder)!r}: encoder.json and vocab.bpe do not make a tokenizer ("
    with refusing(before, "); expected are GPT-2's entries and merges"):
        backend = _byte_level(BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe")))
        if backend.token_to_id(END_OF_TEXT) is None:
            raise UserError(f"tokenizer {str(folder)!r}: encoder.json has no {END_OF_TEXT!r}; GPT-2's has one")
        _check_ids(backend.get_vocab().values(), str(folder))
        tokenizer = _wrapped(backend)
        _try_out(tokenizer, str(folder))
    return tokenizer
