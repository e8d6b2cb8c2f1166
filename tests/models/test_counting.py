"""Floating-point operations of mixtures and hybrids; tests/models/test_players.py has the ordinary models."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from avatarl.models import PlayerConfig, forward_flops_per_token
from avatarl.models.players import model_from_config, player_shape

from ..conftest import TINY

SMALL = {name: TINY[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
FOUR_LAYERS = {**SMALL, "num_hidden_layers": 4}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
LATENT |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def tiny_model(architecture: str, settings: dict) -> PreTrainedModel:
    return model_from_config(player_shape(PlayerConfig(architecture=architecture, settings=settings), 300, 32)).eval()


@pytest.mark.parametrize(
    "architecture, settings, per_pair",  # of tokens: scores and values, two each, a channel, a head, an attending layer
    [
        ("llama", FOUR_LAYERS, 4 * 4 * 16),
        ("bloom", FOUR_LAYERS, 4 * 4 * 16),  # without PyTorch's fused attention
        ("mamba", {"hidden_size": 16, "num_hidden_layers": 4}, 0),
        ("rwkv", {"hidden_size": 16, "num_hidden_layers": 4, "attention_hidden_size": 16}, 0),
        ("jamba", {**FOUR_LAYERS, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4}, 2 * 4 * 16),
        ("lfm2", {**FOUR_LAYERS, "layer_types": ["conv", "conv", "full_attention", "conv"]}, 4 * 16),
        ("deepseek_v2", {**SMALL, **LATENT}, 2 * 2 * (12 + 6)),
    ],
)
def test_attention_costs_where_a_model_has_it(architecture: str, settings: dict, per_pair: int):
    model = tiny_model(architecture, settings)
    assert [
        forward_flops_per_token(model, block_size) - forward_flops_per_token(model, 1) for block_size in (31, 2047)
    ] == [
        15 * per_pair,
        1023 * per_pair,
    ]


def test_a_model_is_not_tried_on_more_tokens_than_it_is_to_read():
    model = tiny_model("mpt", {**SMALL, "max_seq_len": 7})  # whose limit has a name of its own
    assert forward_flops_per_token(model, 7) - forward_flops_per_token(model, 1) == 3 * 4 * 16


def test_layers_that_are_gone_through_again_cost_again():
    block_size, model = 32, tiny_model("hrm_text", SMALL)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.arange(block_size).unsqueeze(0), use_cache=False)
    per_pair = forward_flops_per_token(model, 3) - forward_flops_per_token(model, 1)
    masked_pairs = block_size * block_size - block_size * (block_size + 1) // 2
    assert counter.get_total_flops() - per_pair * masked_pairs == block_size * forward_flops_per_token(
        model, block_size
    )


@pytest.mark.parametrize(
    "architecture, count",
    [("mixtral", "num_local_experts"), ("qwen3_moe", "num_experts"), ("gpt_oss", "num_local_experts")],
)
def test_of_experts_a_token_meets_a_few(architecture: str, count: str):
    block_size, experts = 32, {"num_experts_per_tok": 2, count: 8}
    settings = {
        name: value for name, value in TINY.items() if architecture == "gpt_oss" or name != "head_dim"
    } | experts
    model = tiny_model(architecture, settings)
    model.set_attn_implementation("eager")  # whose products, and those of
    model.set_experts_implementation("eager")  # experts one by one, are ordinary ones that PyTorch counts
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.arange(block_size).unsqueeze(0), use_cache=False)
    masked_pairs = block_size * block_size - block_size * (block_size + 1) // 2
    expected = block_size * forward_flops_per_token(model, block_size)
    assert counter.get_total_flops() - 4 * 16 * masked_pairs == expected


def test_a_convolution_is_no_stack_of_experts():
    settings = {**SMALL, "intermediate_size": 32, "num_experts": 4, "expert_layer_offset": 0}
    few, many = (
        forward_flops_per_token(tiny_model("jamba", {**settings, "num_experts_per_tok": met}), 8) for met in (1, 3)
    )
    assert many - few == 2 * 2 * 3 * 16 * 32  # two more of gate, up and down
