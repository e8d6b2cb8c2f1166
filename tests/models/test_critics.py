"""Critics: opened from any folder that holds one, frozen, and refused where their tokens are not the data's."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    Mamba2Config,
    MambaConfig,
    MptConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RwkvConfig,
)

from avatarl import UserError
from avatarl.data.prepare import prepare
from avatarl.models import (
    PlayerConfig,
    build_player,
    cache_critic,
    check_same_vocabulary,
    forward_flops_per_token,
    load_critic,
)
from avatarl.models.critics import FrozenModel
from avatarl.models.loading import head_weight
from avatarl.models.players import model_from_config
from avatarl.objective import AvataRLConfig, make_objective
from avatarl.planning import plan
from avatarl.results import evaluate
from avatarl.training import train
from avatarl.training.model import PlayerWithLoss

from ..conftest import BLOCK, TINY, TINY_PLAYER, write_documents


def test_a_model_folder_opens_frozen_and_in_eval_mode(critic_folder: Path, tokenizer):
    critic = load_critic(critic_folder, tokenizer)
    assert not critic.training
    assert not any(parameter.requires_grad for parameter in critic.parameters())
    assert {parameter.dtype for parameter in critic.parameters()} == {torch.float32}
    half = load_critic(str(critic_folder), tokenizer, torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_a_run_folder_stands_for_its_best_player(tiny_config, tmp_path: Path, tokenizer):
    train(tiny_config(tmp_path, objective="cross_entropy", steps=3), quiet=True)
    from_run = load_critic(tmp_path / "run", tokenizer)
    from_player = load_critic(tmp_path / "run" / "player", tokenizer)
    assert torch.equal(head_weight(from_run), head_weight(from_player))


def test_another_vocabulary_is_refused_with_the_first_token_that_differs(tmp_path: Path, tokenizer):
    source = write_documents(tmp_path / "other.jsonl", count=30, seed=9)
    source.write_text(source.read_text().replace("owl", "zebra"))
    prepare([str(source)], tmp_path / "other", tokenizer="bpe:290", quiet=True)
    other = tmp_path / "other" / "tokenizer"
    critic = tmp_path / "critic"
    build_player(TINY_PLAYER, tokenizer, BLOCK, seed=1).save_pretrained(critic)
    for path in other.iterdir():
        shutil.copy(path, critic)
    with pytest.raises(UserError, match=r"another vocabulary \(\d+ tokens\) than the data \(\d+ tokens\): id \d+ is"):
        load_critic(critic, tokenizer)


def own_tokens_and_one_more(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<extra>"])
    return other


def own_tokens_without_the_last(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["merges"].pop()
    content["model"]["vocab"] = {token: number for token, number in tokenizer.get_vocab().items() if number < 299}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))


def own_tokens_but_two_changed_about(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))


def tokens_in_gpt2s_order(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Bytes first and the end of a text last, as GPT-2 has them; ours is trained with that first."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*letters, "<|endoftext|>"])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocabulary, [])))


@pytest.mark.parametrize(
    "make, found",
    [
        (
            own_tokens_and_one_more,
            r"\(301 tokens\) than the data \(300 tokens\): id 300 is '<extra>' there and no token",
        ),
        (own_tokens_without_the_last, r"\(299 tokens\) than the data \(300 tokens\): id 299 is no token there and '"),
        (own_tokens_but_two_changed_about, r"\(300 tokens\) than the data \(300 tokens\): id \d+ is 'B' there and 'A'"),
        (tokens_in_gpt2s_order, r"\(257 tokens\) than the data \(300 tokens\): id 0 is '!' there and '<|endoftext|>'"),
    ],
)
def test_the_first_token_that_differs_is_shown(tokenizer, make: Callable, found: str):
    with pytest.raises(UserError, match=f"critic other has another vocabulary {found}") as refusal:
        check_same_vocabulary(tokenizer, make(tokenizer), "other")
    assert "expected a critic trained with the data's tokenizer" in str(refusal.value)
    check_same_vocabulary(tokenizer, copy.deepcopy(tokenizer), "the same")


def test_a_critic_with_fewer_outputs_than_tokens_is_refused(tmp_path: Path, tokenizer):
    critic = build_player(TINY_PLAYER, tokenizer, BLOCK, seed=1)
    critic.resize_token_embeddings(len(tokenizer) - 5)
    critic.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match=f"has {len(tokenizer) - 5} output rows for {len(tokenizer)} tokens"):
        load_critic(tmp_path / "small", tokenizer)


def test_pickled_weights_are_refused(tmp_path: Path, critic_folder: Path, tokenizer):
    folder = tmp_path / "pickled"
    shutil.copytree(critic_folder, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="no .safetensors file"):
        load_critic(folder, tokenizer)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, tokenizer):
    with pytest.raises(UserError, match="is neither; expected a run folder .* or a model folder"):
        load_critic(tmp_path, tokenizer)


def test_a_model_folder_without_a_tokenizer_is_refused(tmp_path: Path, tokenizer):
    build_player(TINY_PLAYER, tokenizer, BLOCK, seed=1).save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="bare"):
        load_critic(tmp_path / "bare", tokenizer)


def test_damaged_weights_are_refused_in_one_line(tmp_path: Path, critic_folder: Path, tokenizer):
    folder = tmp_path / "damaged"
    shutil.copytree(critic_folder, folder)
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="cannot be opened as a causal language model") as refusal:
        load_critic(folder, tokenizer)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "config",
    [
        PlayerConfig(settings={**TINY, "hidden_size": 24, "num_hidden_layers": 2}),
        PlayerConfig(architecture="gpt2", settings={"n_embd": 8, "n_layer": 1, "n_head": 2}),
        PlayerConfig(architecture="qwen3", settings={**TINY, "hidden_size": 24, "tie_word_embeddings": False}),
    ],
    ids=["wider", "gpt2", "qwen3"],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_critic_of_another_shape_judges(tmp_path: Path, tiny_config, tokenizer, config: PlayerConfig, precision: str):
    critic = build_player(config, tokenizer, BLOCK, seed=3)
    critic.save_pretrained(tmp_path / "critic")
    tokenizer.save_pretrained(tmp_path / "critic")
    settings = dict(critic=str(tmp_path / "critic"), steps=2, precision=precision)
    summary = train(tiny_config(tmp_path, **settings), quiet=True)
    assert summary["critic_flops"] > 0


def test_a_padded_critic_says_the_same_as_without_padding(tmp_path: Path, critic_folder: Path, tokenizer):
    """Rows beyond the tokenizer's ids have large weights here, so that they would win if they took part."""
    plain = load_critic(critic_folder, tokenizer)
    padded = load_critic(critic_folder, tokenizer)
    padded.resize_token_embeddings(len(tokenizer) + 20)
    with torch.no_grad():
        head_weight(padded)[len(tokenizer) :] = 100.0
    padded.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    padded = load_critic(tmp_path / "padded", tokenizer)
    assert head_weight(padded).shape[0] == len(tokenizer) + 20

    player = build_player(TINY_PLAYER, tokenizer, BLOCK, seed=1)
    objective = make_objective("avatarl", AvataRLConfig(top_k=4, threshold="none"))
    tokens = torch.arange(2 * (BLOCK + 1)).reshape(2, BLOCK + 1)
    losses = []
    for critic in (plain, padded):
        model, answers = PlayerWithLoss(player, objective, len(tokenizer)), FrozenModel(critic)(tokens[:, :-1])
        losses.append(model(tokens[:, :-1], tokens[:, 1:], [answers])[0])
    torch.testing.assert_close(losses[0], losses[1])


def test_a_critic_that_reads_less_than_a_block_is_refused(tmp_path: Path, tiny_config, tokenizer):
    build_player(TINY_PLAYER, tokenizer, BLOCK // 2, seed=3).save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    with pytest.raises(UserError, match="reads at most 8 tokens; expected at least block_size, 16"):
        train(tiny_config(tmp_path, critic=str(tmp_path / "short")), quiet=True)
    assert not (tmp_path / "run").exists()


WITHOUT_ATTENTION = {
    "mamba": MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=2, state_size=4),
    "mamba2": Mamba2Config(
        vocab_size=300, hidden_size=16, num_hidden_layers=2, state_size=4, num_heads=4, head_dim=8, n_groups=1
    ),
    "rwkv": RwkvConfig(vocab_size=300, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16),
}


def saved(folder: Path, tokenizer, config: PreTrainedConfig) -> str:
    model_from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "architecture",
    ["mamba", *(pytest.param(each, marks=pytest.mark.slow) for each in WITHOUT_ATTENTION if each != "mamba")],
)
def test_a_critic_without_attention_judges(tmp_path: Path, tiny_config, tokenizer, architecture: str):
    critic = saved(tmp_path / "critic", tokenizer, WITHOUT_ATTENTION[architecture])
    config = tiny_config(tmp_path, critic=critic, steps=2)
    train(config, quiet=True)
    per_token = forward_flops_per_token(load_critic(critic, tokenizer), BLOCK)
    assert plan(config).flops["critic"] == 2 * 4 * BLOCK * per_token
    cache_critic(
        critic, config.data, tmp_path / "cache", block_size=BLOCK, bytes_per_token=54, precision="fp32", quiet=True
    )
    manifest = json.loads((tmp_path / "cache" / "cache.json").read_text())
    assert manifest["critic"]["flops_per_token"] == per_token


def test_a_critic_that_cannot_read_a_block_is_refused_in_one_line(tmp_path: Path, tiny_config, tokenizer):
    """MPT has a table of positions, and no limit that other models name."""
    critic = saved(
        tmp_path / "mpt", tokenizer, MptConfig(vocab_size=300, d_model=16, n_heads=2, n_layers=1, max_seq_len=8)
    )
    config = tiny_config(tmp_path, critic=critic)
    for judge in (
        lambda: train(config, quiet=True),
        lambda: plan(config),
        lambda: cache_critic(critic, config.data, tmp_path / "cache", block_size=BLOCK, bytes_per_token=54, quiet=True),
        lambda: evaluate(critic, config.data, block_size=BLOCK),
    ):
        with pytest.raises(UserError, match="cannot (read a window of 16 tokens|be planned.*)") as refusal:
            judge()
        assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
