"""Texts: the same for the same seed, greedy where asked to be, and never longer than asked or than fits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationMixin

from avatarl import UserError
from avatarl.data.tokenizer import open_tokenizer
from avatarl.models import build_player
from avatarl.results import generate
from avatarl.training import train

from ..conftest import BLOCK, TINY_PLAYER, save_model
from ..tokenizers_of_kinds import save_tokenizer

PROMPT = "quick fox"


@pytest.fixture
def drawn(monkeypatch) -> list[torch.Tensor]:
    """The ids (samples, length) that the library below returns, call by call: prompt and continuation."""
    recorded: list[torch.Tensor] = []
    real = GenerationMixin.generate

    def record(self: GenerationMixin, *arguments, **settings):
        recorded.append(real(self, *arguments, **settings))
        return recorded[-1]

    monkeypatch.setattr(GenerationMixin, "generate", record)
    return recorded


def greedy(folder: Path, ids: list[int], count: int, end_id: int) -> list[int]:
    """The most likely continuation, one token at a time, from the whole sequence's logits."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for _ in range(count):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] == end_id:
            break
    return ids


def test_the_seed_decides_the_texts(player_folder: Path):
    first = generate(player_folder, PROMPT, samples=3, max_new_tokens=8, temperature=1.5, seed=4, device="cpu")
    assert first == generate(player_folder, PROMPT, samples=3, max_new_tokens=8, temperature=1.5, seed=4, device="cpu")
    assert first != generate(player_folder, PROMPT, samples=3, max_new_tokens=8, temperature=1.5, seed=5, device="cpu")
    assert len(first) == 3
    assert len(set(first)) > 1


def test_temperature_zero_takes_the_most_likely_token(player_folder: Path, tokenizer, drawn):
    prompt = tokenizer.encode(PROMPT)
    generate(player_folder, PROMPT, max_new_tokens=6, temperature=0, seed=1, device="cpu")
    generate(player_folder, PROMPT, max_new_tokens=6, temperature=0, seed=2, device="cpu")
    expected = greedy(player_folder, prompt, 6, tokenizer.eos_token_id)
    assert [ids[0].tolist() for ids in drawn] == [expected, expected]


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}])
def test_the_narrowest_choice_is_the_most_likely_token(player_folder: Path, narrow: dict):
    greedy_texts = generate(player_folder, PROMPT, max_new_tokens=6, temperature=0, device="cpu")
    assert generate(player_folder, PROMPT, max_new_tokens=6, temperature=3.0, device="cpu", **narrow) == greedy_texts
    assert generate(player_folder, PROMPT, max_new_tokens=6, temperature=3.0, device="cpu") != greedy_texts


def test_top_k_and_top_p_keep_to_their_lists(player_folder: Path, tokenizer, drawn):
    """Of the first drawn tokens of many samples, all are on the list, and at a high temperature more than one is."""
    prompt = tokenizer.encode(PROMPT)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(player_folder)(torch.tensor([prompt])).logits[0, -1]
    probs, order = (logits / 2).softmax(0).sort(descending=True)
    settings = dict(samples=200, max_new_tokens=1, temperature=2.0, device="cpu")
    generate(player_folder, PROMPT, top_k=5, **settings)
    generate(player_folder, PROMPT, top_p=0.5, **settings)
    generate(player_folder, PROMPT, **settings)
    shortest = int((probs.cumsum(0) < 0.5).sum()) + 1
    chosen = [set(ids[:, -1].tolist()) for ids in drawn]
    assert 1 < len(chosen[0]) and chosen[0] <= set(order[:5].tolist())
    assert 1 < len(chosen[1]) and chosen[1] <= set(order[:shortest].tolist())
    assert not chosen[2] <= set(order[:50].tolist())  # no hidden list of the library's own


def test_what_a_folder_wants_of_generation_is_ignored(player_folder: Path, tmp_path: Path):
    expected = generate(player_folder, PROMPT, max_new_tokens=8, temperature=0, device="cpu")
    copy = shutil.copytree(player_folder, tmp_path / "model")
    wishes = {"repetition_penalty": 9.0, "num_beams": 3, "no_repeat_ngram_size": 1, "forced_eos_token_id": 5}
    (copy / "generation_config.json").write_text(json.dumps(wishes))
    assert generate(copy, PROMPT, max_new_tokens=8, temperature=0, device="cpu") == expected


@pytest.mark.parametrize("prompt", [PROMPT, "  two spaces", "a\n\nb ", "ä 漢", "<|endoftext|> x"])
def test_the_prompt_is_kept_as_it_is(player_folder: Path, prompt: str, tokenizer):
    for text in generate(player_folder, prompt, samples=2, max_new_tokens=1, device="cpu"):
        assert text.startswith(prompt)


@pytest.mark.parametrize("kind", ["SentencePiece", "WordPiece", "NFC", "end not special"])
def test_what_a_tokenizer_changes_is_kept_too(kind: str, tmp_path: Path):
    """And an end of text that the tokenizer knows by its name alone is no part of the text."""
    tokenizer = open_tokenizer(save_tokenizer(kind, tmp_path / "tokenizer"))
    player = save_model(tmp_path / "player", tokenizer, seed=5, factor=15)
    for text in generate(player, "The cafe\u0301 , to", samples=40, temperature=2, max_new_tokens=4, device="cpu"):
        assert text.startswith("The cafe\u0301 , to")
        assert tokenizer.eos_token not in text


def test_an_empty_prompt_begins_a_document(player_folder: Path, tokenizer, drawn):
    (text,) = generate(player_folder, max_new_tokens=5, device="cpu")
    (ids,) = drawn[0].tolist()
    assert ids[0] == tokenizer.eos_token_id
    assert text == tokenizer.decode(ids[1:], skip_special_tokens=True)


def test_never_more_tokens_than_asked_or_than_fit(player_folder: Path, tokenizer, drawn):
    length = len(tokenizer.encode(PROMPT))
    for wanted in (1, 3, 10_000):
        generate(player_folder, PROMPT, samples=20, max_new_tokens=wanted, device="cpu")
        assert length < drawn[-1].shape[1] <= min(length + wanted, BLOCK)


def test_a_prompt_that_fills_the_context_is_refused(player_folder: Path, tokenizer, drawn):
    piece = "old oak "
    assert len(tokenizer.encode(piece * BLOCK)) > BLOCK
    with pytest.raises(UserError, match=rf"prompt has \d+ tokens; expected fewer than the model's context of {BLOCK}"):
        generate(player_folder, piece * BLOCK, device="cpu")
    exactly = tokenizer.decode([tokenizer.encode("q")[0]] * BLOCK)
    assert len(tokenizer.encode(exactly)) == BLOCK
    with pytest.raises(UserError, match=f"prompt has {BLOCK} tokens"):
        generate(player_folder, exactly, device="cpu")
    generate(player_folder, exactly[1:], device="cpu")
    assert drawn[-1].shape[1] == BLOCK


def test_a_text_ends_with_its_document(tmp_path: Path, tokenizer, drawn):
    """A model that wants nothing but the end of the text says it once."""
    player = build_player(TINY_PLAYER, tokenizer, BLOCK, seed=1)
    with torch.no_grad():
        # Each weight of the end's row is what its input, the last token, has there too: the tied rows agree.
        player.get_output_embeddings().weight.zero_()
        player.get_output_embeddings().weight[tokenizer.eos_token_id] = 1.0
    player.save_pretrained(tmp_path / "ends")
    tokenizer.save_pretrained(tmp_path / "ends")
    (text,) = generate(tmp_path / "ends", temperature=0, device="cpu")
    assert text == ""
    assert drawn[-1].tolist() == [[tokenizer.eos_token_id] * 2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_token_are_never_drawn(
    tmp_path: Path, player_folder: Path, tokenizer, drawn, temperature: float
):
    """The padded rows are three times the likeliest token's, so that without the ban nothing else is drawn."""
    model = AutoModelForCausalLM.from_pretrained(player_folder)
    prompt = torch.tensor([tokenizer.encode(PROMPT)])
    with torch.no_grad():
        best = int(model(prompt).logits[0, -1].argmax())
    model.resize_token_embeddings(len(tokenizer) + 30)
    with torch.no_grad():
        weight = model.get_output_embeddings().weight
        weight[len(tokenizer) :] = 3 * weight[best]
        assert int(model(prompt).logits[0, -1].argmax()) >= len(tokenizer)
    model.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    generate(tmp_path / "padded", PROMPT, samples=20, max_new_tokens=10, temperature=temperature, device="cpu")
    assert int(drawn[-1].max()) < len(tokenizer)
    if temperature == 0:
        assert drawn[-1][0, prompt.shape[1]] == best


def test_the_global_generator_is_left_alone(player_folder: Path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    generate(player_folder, PROMPT, max_new_tokens=3, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_folder_speaks_as_its_best_player(tiny_config, tmp_path: Path):
    train(tiny_config(tmp_path, objective="cross_entropy", steps=3), quiet=True)
    texts = generate(tmp_path / "run", PROMPT, samples=2, max_new_tokens=5, device="cpu")
    assert texts == generate(tmp_path / "run" / "player", PROMPT, samples=2, max_new_tokens=5, device="cpu")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("samples", 0),
        ("samples", 1.5),
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_k", 0),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("seed", -1),
        ("seed", 1 << 63),
        ("device", "abacus"),
    ],
)
def test_a_value_out_of_range_is_named(player_folder: Path, field: str, value):
    with pytest.raises(UserError, match=f"{field} is .*expected"):
        generate(player_folder, **{"device": "cpu", field: value})


def test_no_model_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="is neither; expected a run folder .* or a model folder"):
        generate(tmp_path, device="cpu")
