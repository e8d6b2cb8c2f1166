"""Players have the size they claim, weights that the seed alone decides, and a head the objectives can use."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from avatarl import UserError
from avatarl.models import (
    PRESETS,
    PlayerConfig,
    build_player,
    count_parameters,
    forward_flops_per_token,
    training_flops_per_token,
)
from avatarl.models.loading import check_model, head_weight, last_hidden
from avatarl.models.players import _model_config, player_shape

from ..conftest import BLOCK, TINY, TINY_PLAYER


class TokenizerOfSize:
    """What a configuration needs to know of a tokenizer."""

    bos_token_id = eos_token_id = pad_token_id = 0

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size


def model_without_weights(config: PlayerConfig, vocabulary: int, block_size: int) -> PreTrainedModel:
    """The model on the meta device, where a parameter has a shape and no memory."""
    with torch.device("meta"):
        model_config = _model_config(config, TokenizerOfSize(vocabulary), block_size)
        return AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)


@pytest.mark.parametrize("preset, non_embedding", [("1m", 1_004_928), ("5m", 4_967_680)])
def test_small_presets_are_named_after_the_parameters_outside_the_embedding(preset: str, non_embedding: int):
    for vocabulary in (300, 4096):
        count = count_parameters(model_without_weights(PlayerConfig(preset), vocabulary, 256))
        assert count.non_embedding == non_embedding
        assert count.embedding == vocabulary * PRESETS[preset].hidden_size  # tied: counted once


@pytest.mark.parametrize("preset, total", [("30m", 29_920_512), ("124m", 123_551_232), ("250m", 250_726_400)])
def test_large_presets_are_named_after_all_parameters_with_the_tokens_of_gpt2(preset: str, total: int):
    count = count_parameters(model_without_weights(PlayerConfig(preset), 50_257, 1024))
    assert count.total == total


def test_every_preset_is_counted_here():
    assert set(PRESETS) == {"1m", "5m", "30m", "124m", "250m"}


def test_an_untied_head_counts_as_embedding():
    tied = count_parameters(model_without_weights(TINY_PLAYER, 300, BLOCK))
    untied = PlayerConfig(settings={**TINY, "tie_word_embeddings": False})
    untied_count = count_parameters(model_without_weights(untied, 300, BLOCK))
    assert untied_count.non_embedding == tied.non_embedding
    assert untied_count.embedding == 2 * tied.embedding == 2 * 300 * 16


SETTINGS = {
    "llama": TINY,
    "qwen3": TINY,
    "gpt2": {name: TINY[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
}


@pytest.mark.parametrize("architecture", SETTINGS)
def test_each_architecture_builds_in_float32_and_reads_a_block(tokenizer, architecture: str):
    config = PlayerConfig(architecture=architecture, settings=SETTINGS[architecture])
    player = build_player(config, tokenizer, BLOCK, seed=1)
    assert player.config.model_type == architecture
    assert {parameter.dtype for parameter in player.parameters()} == {torch.float32}
    assert head_weight(player).shape == (len(tokenizer), 16)
    assert head_weight(player) is player.get_input_embeddings().weight
    assert last_hidden(player, torch.zeros(2, BLOCK, dtype=torch.long)).shape == (2, BLOCK, 16)


@pytest.mark.parametrize("architecture", SETTINGS)
def test_the_shortest_block_builds(tokenizer, architecture: str):
    config = PlayerConfig(architecture=architecture, settings=SETTINGS[architecture])
    build_player(config, tokenizer, block_size=1, seed=1)


def test_a_later_token_does_not_change_an_earlier_state(tokenizer):
    player = build_player(TINY_PLAYER, tokenizer, BLOCK, seed=1).eval()
    ids = torch.arange(BLOCK).unsqueeze(0)
    changed = ids.clone()
    changed[0, -1] = 200
    before, after = last_hidden(player, ids), last_hidden(player, changed)
    torch.testing.assert_close(before[:, :-1], after[:, :-1])
    assert not torch.allclose(before[:, -1], after[:, -1])


def test_the_seed_alone_decides_the_weights(tokenizer):
    torch.manual_seed(5)
    first = build_player(TINY_PLAYER, tokenizer, BLOCK, seed=1).state_dict()
    torch.manual_seed(6)
    again = build_player(TINY_PLAYER, tokenizer, BLOCK, seed=1).state_dict()
    other = build_player(TINY_PLAYER, tokenizer, BLOCK, seed=2).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_building_leaves_the_global_generator_alone(tokenizer):
    before = torch.get_rng_state()
    build_player(TINY_PLAYER, tokenizer, BLOCK, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"preset": "124M"}, "player.preset is '124M'.*did you mean '124m'"),
        ({"architecture": "lama"}, "player.architecture is 'lama'.*did you mean 'llama'"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        player_shape(PlayerConfig(**settings), vocab_size=3, block_size=8)


@pytest.mark.parametrize(
    "architecture, settings, message",
    [
        ("llama", {"atention_dropout": 0.1}, "'atention_dropout'.*did you mean 'attention_dropout'"),
        ("gpt2", {"hidden_size": 15, "num_attention_heads": 2}, "'gpt2' cannot be built with player.settings.*15"),
        ("llama", {**TINY, "_attn_implementation": "owner/kernel"}, "is 'owner/kernel'; code from the Hub is not run"),
        ("llama", {"hidden_size": "wide"}, "'llama' cannot be built with player.settings.*wide"),
        ("llama", {**TINY, "vocab_size": 10}, "vocab_size is 10; expected at least the tokenizer's 3"),
        (
            "llama",
            {**TINY, "max_position_embeddings": 8},
            "max_position_embeddings is 8; expected at least block_size, 16",
        ),
        ("bert", {name: TINY[name] for name in ("hidden_size", "num_hidden_layers")}, "'bert'"),
        # Built, and not to be run: with the preset's sizes, without other inputs, or on as many tokens.
        ("codegen", SETTINGS["gpt2"], "'codegen' cannot be built with player.settings {'hidden_size': 16.*shape"),
        (
            "deepseek_v3",
            {"hidden_size": 32, "num_hidden_layers": 1},
            "'deepseek_v3' cannot be built with player.settings",
        ),
        ("xmod", SETTINGS["gpt2"], "'xmod' cannot be built with player.settings.*language"),
        (
            "mpt",
            {**SETTINGS["gpt2"], "max_seq_len": 8},
            "'mpt' with player.settings .* cannot read a window of 16 tokens",
        ),
        ("gemma3", {}, "player.architecture is 'gemma3', an encoder-decoder or multimodal"),
        ("bart", {}, "player.architecture is 'bart', an encoder-decoder or multimodal"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_in_one_line(tokenizer, architecture, settings, message):
    with pytest.raises(UserError, match=message) as refusal:
        build_player(PlayerConfig(architecture=architecture, settings=settings), tokenizer, BLOCK, seed=1)
    assert "\n" not in str(refusal.value)


EXPERTS = {**SETTINGS["gpt2"], "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
EXPERTS |= {"intermediate_size": 32, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    "architecture, settings, asked",
    [
        ("mixtral", {"output_router_logits": True}, "output_router_logits: True, router_aux_loss_coef: 0.001"),
        ("qwen3_moe", {"output_router_logits": True, "router_aux_loss_coef": 1e-6}, "router_aux_loss_coef: 1e-06"),
        ("jetmoe", {"output_router_logits": True}, "aux_loss_coef: 0.01"),
        ("bamba", {"z_loss_coefficient": 1e-4, "mamba_n_heads": 2, "mamba_d_head": 16}, "z_loss_coefficient: 0.0001"),
    ],
)
def test_a_loss_that_the_model_would_add_itself_is_refused_where_it_is_asked_for(
    tokenizer, architecture: str, settings: dict, asked: str
):
    known = AutoConfig.for_model(architecture)
    sizes = {name: value for name, value in EXPERTS.items() if hasattr(known, name)} | settings
    off = sizes | {name: value * 0 for name, value in settings.items() if "loss" in name}
    off |= {name: False for name in settings if name == "output_router_logits"}
    build_player(PlayerConfig(architecture=architecture, settings=off), tokenizer, BLOCK, seed=1)
    with pytest.raises(
        UserError, match=f"'{architecture}': player.settings: .*{asked}.* adds .* to its loss"
    ) as refusal:
        build_player(PlayerConfig(architecture=architecture, settings=sizes), tokenizer, BLOCK, seed=1)
    assert "expected output_router_logits: false, or a coefficient of 0" in str(refusal.value)


def test_a_router_loss_with_a_coefficient_of_zero_is_none(tokenizer):
    settings = {name: value for name, value in EXPERTS.items() if name != "num_experts"}
    settings |= {"output_router_logits": True, "router_aux_loss_coef": 0.0}
    build_player(PlayerConfig(architecture="mixtral", settings=settings), tokenizer, BLOCK, seed=1)


def test_a_setting_in_the_words_of_its_architecture_is_not_overruled_by_the_preset(tokenizer):
    settings = {"n_embd": 32, "n_layer": 1, "n_head": 2}
    player = build_player(PlayerConfig(architecture="gpt2", settings=settings), tokenizer, BLOCK, seed=1)
    assert (player.config.hidden_size, player.config.num_hidden_layers, player.config.n_head) == (32, 1, 2)


def test_head_width_and_key_heads_follow_the_settings():
    settings = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    config = model_without_weights(PlayerConfig(settings=settings), 300, BLOCK).config
    assert (config.head_dim, config.num_key_value_heads) == (8, 2)


@pytest.mark.parametrize(
    "architecture, found", [("gemma2", "capped at 30"), ("cohere", "scaled by 0.0625"), ("phi", "have a bias")]
)
def test_logits_that_are_no_products_are_refused(tokenizer, architecture: str, found: str):
    settings = {name: TINY[name] for name in TINY if architecture == "gemma2" or name != "head_dim"}
    with pytest.raises(UserError, match=f"'{architecture}': its logits .*{found}"):
        build_player(PlayerConfig(architecture=architecture, settings=settings), tokenizer, BLOCK, seed=1)


def test_a_head_with_a_bias_is_refused(tokenizer):
    player = build_player(TINY_PLAYER, tokenizer, BLOCK, seed=1)
    head = nn.Linear(16, len(tokenizer), bias=True)
    head.weight = player.lm_head.weight
    nn.init.zeros_(head.bias)  # as a fresh model's, which training would move
    player.lm_head = head
    with pytest.raises(UserError, match="its logits have a bias"):
        check_model(player, "a player")


def test_the_head_check_leaves_the_model_as_it_was(tokenizer):
    player = build_player(TINY_PLAYER, tokenizer, BLOCK, seed=1).train()
    before = {name: value.clone() for name, value in player.state_dict().items()}
    check_model(player, "a player")
    assert player.training
    assert all(torch.equal(value, before[name]) for name, value in player.state_dict().items())


@pytest.mark.parametrize("architecture", SETTINGS)
def test_flops_agree_with_pytorchs_counter(tokenizer, architecture: str):
    """PyTorch counts attention over all T² pairs; the formula counts the T (T + 1) / 2 that a causal mask leaves.

    After that correction both count the same products, so the tolerance is none.
    """
    block_size = 32
    player = build_player(
        PlayerConfig(architecture=architecture, settings=SETTINGS[architecture]), tokenizer, block_size, seed=1
    ).eval()
    player.set_attn_implementation("eager")  # whose products are ordinary matrix products, which the counter sees
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        player(input_ids=torch.zeros(1, block_size, dtype=torch.long), use_cache=False)
    channels, layers = 16, 1
    masked_pairs = block_size * block_size - block_size * (block_size + 1) // 2
    expected = block_size * forward_flops_per_token(player, block_size)
    assert counter.get_total_flops() - 4 * layers * channels * masked_pairs == expected
    assert training_flops_per_token(player, block_size) == 3 * forward_flops_per_token(player, block_size)


def test_a_model_that_reads_ahead_is_refused(tokenizer):
    """Its hidden states are made to know the last token, as those of a bidirectional model do."""
    player = build_player(PlayerConfig(settings=TINY), tokenizer, block_size=16, seed=1)
    embed = player.get_input_embeddings()
    embed.register_forward_hook(lambda module, inputs, output: output + output[:, -1:])
    with pytest.raises(UserError, match="depend on later tokens"):
        check_model(player, "a player")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
def test_dropout_is_off_unless_asked_for(architecture, tokenizer):
    player = build_player(PlayerConfig(architecture=architecture), tokenizer, block_size=16, seed=1).train()
    ids = torch.arange(16).unsqueeze(0)
    assert torch.equal(last_hidden(player, ids), last_hidden(player, ids))
