"""Minimal pairs against the loss that transformers itself computes, and every malformed line in one line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from avatarl import UserError
from avatarl.models import build_player
from avatarl.results import minimal_pairs, read_pairs, score_pairs
from avatarl.results.minimal_pairs import MinimalPair, sentence_log_probs, summarise_pairs

from ..conftest import BLOCK, TINY_PLAYER

SENTENCES = [
    ("old oak", "oak old"),
    ("the wise owl", "the wise barn"),
    ("quick fox", "quick fix"),
    ("tall ship red barn", "tall ship barn red"),
    ("cold night", "a cold night"),
]


def pairs_of(sentences: Sequence[tuple[str, str]]) -> list[MinimalPair]:
    return [MinimalPair(good, bad, "all", f"here:{number}") for number, (good, bad) in enumerate(sentences, start=1)]


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., Path]:
    """``lines(name, *records)`` writes a file of JSON lines, strings as they are, and returns its path."""

    def write(name: str, *records: object) -> Path:
        path = tmp_path / "pairs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = [record if isinstance(record, str) else json.dumps(record) for record in records]
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
        return path

    return write


# --- scores ---------------------------------------------------------------------------------------------------------


def log_prob_by_transformers(folder: Path, tokenizer, sentence: str) -> float:
    """The sentence after the end of a text, from the mean loss that the library gives for its labels."""
    ids = tokenizer(sentence)["input_ids"]
    inputs = torch.tensor([[tokenizer.eos_token_id, *ids]])
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(folder)(input_ids=inputs, labels=inputs).loss
    return -loss.item() * len(ids)


def test_the_higher_log_probability_wins_as_the_librarys_own_loss_has_it(player_folder: Path, tokenizer):
    expected = [
        [log_prob_by_transformers(player_folder, tokenizer, sentence) for sentence in pair] for pair in SENTENCES
    ]
    player = AutoModelForCausalLM.from_pretrained(player_folder)
    sentences = [tuple(tokenizer(sentence)["input_ids"]) for pair in SENTENCES for sentence in pair]
    found = sentence_log_probs(player, sentences, tokenizer.eos_token_id, len(tokenizer))
    assert [found[sentence] for sentence in sentences] == pytest.approx(sum(expected, []), rel=1e-5)

    wins = sum(good > bad for good, bad in expected)
    assert 0 < wins < len(SENTENCES)
    result = score_pairs(player_folder, pairs_of(SENTENCES), device="cpu")
    assert (result["accuracy"], result["pairs"], result["ties"]) == (wins / len(SENTENCES), len(SENTENCES), 0)


def test_how_sentences_are_put_together_moves_no_score(player_folder: Path, tokenizer, monkeypatch):
    player = AutoModelForCausalLM.from_pretrained(player_folder)
    generator = torch.Generator().manual_seed(1)
    sentences = [
        tuple(torch.randint(1, 300, (length,), generator=generator).tolist()) for length in (3, 7, 3, 16, 7, 3, 1)
    ]
    together = sentence_log_probs(player, sentences, 0, len(tokenizer))
    monkeypatch.setattr(minimal_pairs, "POSITIONS_AT_ONCE", 6)
    assert sentence_log_probs(player, sentences, 0, len(tokenizer)) == pytest.approx(together, rel=1e-5)
    assert len(together) == 7


def test_a_tie_counts_half(player_folder: Path):
    same = [("old oak", "old oak"), *[("blue sea", "blue sea")] * 2, SENTENCES[0]]
    alone = score_pairs(player_folder, pairs_of(SENTENCES[:1]), device="cpu")
    result = score_pairs(player_folder, pairs_of(same), device="cpu")
    assert (result["ties"], result["accuracy"]) == (3, (1.5 + alone["accuracy"]) / 4)


def test_a_model_of_nan_is_refused_and_loses_no_pair(player_folder: Path, monkeypatch):
    monkeypatch.setattr(
        minimal_pairs, "last_hidden", lambda model, ids: torch.full((*ids.shape, model.config.hidden_size), torch.nan)
    )
    with pytest.raises(UserError, match="its logits are NaN at the pair here:1"):
        score_pairs(player_folder, pairs_of(SENTENCES), device="cpu")


def test_groups_count_by_themselves(player_folder: Path):
    pairs = [pair._replace(group=f"g{number % 2}") for number, pair in enumerate(pairs_of(SENTENCES))]
    result = score_pairs(player_folder, pairs, device="cpu")
    groups = result.pop("groups")
    assert list(groups) == ["g0", "g1"]
    for name, group in groups.items():
        members = [pair for pair in pairs if pair.group == name]
        alone = score_pairs(player_folder, members, device="cpu")
        assert alone.pop("groups") == {name: group}
        assert alone == group
    assert sum(group["accuracy"] * group["pairs"] for group in groups.values()) == pytest.approx(5 * result["accuracy"])


def test_the_standard_error_by_hand():
    """Of 1, 1, ½, 0: mean 0.625, sample deviation √(0.6875 / 3), over √4."""
    expected = {"accuracy": 0.625, "standard_error": math.sqrt(0.6875 / 3) / 2, "pairs": 4, "ties": 1}
    assert summarise_pairs([1.0, 1.0, 0.5, 0.0]) == pytest.approx(expected)
    assert summarise_pairs([1.0])["standard_error"] is None


def test_rows_of_a_padded_head_take_no_part(tmp_path: Path, player_folder: Path, tokenizer):
    padded = AutoModelForCausalLM.from_pretrained(player_folder)
    padded.resize_token_embeddings(len(tokenizer) + 9)
    with torch.no_grad():
        padded.get_output_embeddings().weight[len(tokenizer) :] = 100.0
    sentences = [(5, 6, 7), (8, 9, 10)]
    expected = sentence_log_probs(AutoModelForCausalLM.from_pretrained(player_folder), sentences, 0, len(tokenizer))
    assert sentence_log_probs(padded, sentences, 0, len(tokenizer)) == pytest.approx(expected)


def test_a_special_token_spelled_out_is_text(player_folder: Path, tokenizer):
    spelled = tokenizer.eos_token * 2
    letters = len(tokenizer(spelled, split_special_tokens=True)["input_ids"])
    assert letters > BLOCK
    with pytest.raises(UserError, match=f"^here:1: the bad sentence has {letters} tokens"):
        score_pairs(player_folder, pairs_of([("old", spelled)]), device="cpu")


# --- reading --------------------------------------------------------------------------------------------------------


def test_blimps_format_and_the_plain_one_are_read(lines):
    blimp = {"sentence_good": "A b.", "sentence_bad": "B a.", "UID": "order", "linguistics_term": "x", "pairID": "0"}
    lines("b.jsonl", blimp, "", {"good": "c", "bad": "d"})
    lines("more/a.jsonl", "\ufeff" + json.dumps({"good": "e", "bad": "f", "UID": None}))
    folder = lines(".hidden.jsonl", "no pair").parent
    lines("readme.txt", "no pair")
    first, second, third = read_pairs(folder)
    assert first == MinimalPair("A b.", "B a.", "order", f"{folder}/b.jsonl:1")
    assert second == MinimalPair("c", "d", "b", f"{folder}/b.jsonl:3")
    assert third == MinimalPair("e", "f", "more/a", f"{folder}/more/a.jsonl:1")
    assert read_pairs(folder / "b.jsonl") == [first, second]


def test_linked_folders_of_pairs_are_read_once(lines, tmp_path: Path):
    folder = lines("pairs/a.jsonl", {"good": "a", "bad": "b"}).parent
    elsewhere = lines("elsewhere/c.jsonl", {"good": "c", "bad": "d"}).parent
    for name, target in (("more", elsewhere), ("again", elsewhere), ("loop", folder), ("z.jsonl", folder / "a.jsonl")):
        (folder / name).symlink_to(target)
    assert [pair.good for pair in read_pairs(folder)] == ["a", "c"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not a JSON line"),
        ("[" * 100_000, "not a JSON line"),
        ("[1]", "found a JSON list"),
        ("{}", "found no field; expected a JSON object with sentence_good and sentence_bad, or good and bad"),
        ('{"good": "a", "sentence_bad": "b"}', "found 'good', 'sentence_bad'; expected a JSON object"),
        ('{"good": "a", "bad": 3}', "bad is 3; expected some text"),
        ('{"good": " ", "bad": "b"}', "good is ' '; expected some text"),
        ('{"good": "a", "bad": "\\ud800"}', "bad holds half a surrogate pair"),
        ('{"good": "a", "bad": "b", "UID": [1]}', r"UID is \[1\]; expected some text"),
        (json.dumps({"good": "a" * (1 << 20), "bad": "b"}), "the line is longer than 1,048,576 bytes"),
    ],
)
def test_a_malformed_line_is_named(lines, line: str, message: str):
    path = lines("x.jsonl", {"good": "a", "bad": "b"}, line)
    with pytest.raises(UserError, match=f"^{path}:2: {message}"):
        read_pairs(path)


def test_bytes_that_are_no_text_are_refused(lines):
    path = lines("x.jsonl", {"good": "a", "bad": "b"})
    path.write_bytes(b'{"good": "a", "bad": "\xff"}\n')
    with pytest.raises(UserError, match=f"^{path}:1: not a JSON line"):
        read_pairs(path)


def test_a_source_without_pairs_is_refused(lines, tmp_path: Path):
    with pytest.raises(
        UserError, match="nowhere': no such file or folder; expected a .jsonl file, or a folder of them"
    ):
        read_pairs(tmp_path / "nowhere")
    with pytest.raises(UserError, match="x.txt': expected a .jsonl file"):
        read_pairs(lines("x.txt", {"good": "a", "bad": "b"}))
    with pytest.raises(UserError, match="pairs': the folder has no .jsonl file"):
        read_pairs(tmp_path / "pairs")
    with pytest.raises(UserError, match="x.jsonl: holds no pairs"):
        read_pairs(lines("x.jsonl", "", ""))
    os.mkfifo(tmp_path / "pairs" / "y.jsonl")
    with pytest.raises(UserError, match="y.jsonl is not a regular file"):
        read_pairs(tmp_path / "pairs")


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_sentence_longer_than_the_context_is_named(player_folder: Path, tokenizer):
    fits = tokenizer.decode([5] * BLOCK)
    assert len(tokenizer(fits)["input_ids"]) == BLOCK
    score_pairs(player_folder, pairs_of([(fits, "old oak")]), device="cpu")
    expected = f"^here:2: the bad sentence has {BLOCK + 1} tokens; expected at most {BLOCK}, the model's context$"
    with pytest.raises(UserError, match=expected):
        score_pairs(player_folder, pairs_of([SENTENCES[0], ("old oak", fits + tokenizer.decode([5]))]), device="cpu")


def test_a_tokenizer_that_ends_no_texts_is_refused(tmp_path: Path, player_folder: Path):
    words = Tokenizer(models.WordLevel({"old": 0, "oak": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    tokenizer.save_pretrained(tmp_path / "model")
    build_player(TINY_PLAYER, tokenizer, BLOCK, seed=1).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="model: the tokenizer has no end-of-text token"):
        score_pairs(tmp_path / "model", pairs_of(SENTENCES), device="cpu")
