"""Floating-point operations of models whose weights lie stacked; tests/models/test_players.py has the dense ones."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from avatarl.models import PlayerConfig, forward_flops_per_token
from avatarl.models.players import model_from_config, player_shape

from ..conftest import TINY


@pytest.mark.parametrize("architecture, count", [("mixtral", "num_local_experts"), ("qwen3_moe", "num_experts")])
def test_of_experts_a_token_meets_a_few(architecture: str, count: str):
    block, experts = 32, {"num_experts_per_tok": 2, count: 8}
    settings = {name: value for name, value in TINY.items() if name != "head_dim"} | experts
    model = model_from_config(player_shape(PlayerConfig(architecture=architecture, settings=settings), 300, block))
    model.set_attn_implementation("eager")  # whose products, and those of
    model.set_experts_implementation("eager")  # experts one by one, are ordinary ones that PyTorch counts
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(input_ids=torch.arange(block).unsqueeze(0), use_cache=False)
    masked_pairs = block * block - block * (block + 1) // 2
    expected = block * forward_flops_per_token(model, block)
    assert counter.get_total_flops() - 4 * 16 * masked_pairs == expected
