"""A player with opinions, as a model folder; and two runs of training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from avatarl.models import build_player
from avatarl.training import train

from ..conftest import BLOCK, TINY_PLAYER


@pytest.fixture(scope="session")
def player_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A model that is not the critic, its logits large enough to be sure of some tokens."""
    folder = tmp_path_factory.mktemp("player") / "model"
    player = build_player(TINY_PLAYER, tokenizer, BLOCK, seed=5)
    with torch.no_grad():
        player.get_output_embeddings().weight.mul_(15)
    player.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_config) -> list[Path]:
    """The folders of a player's run and of its cross-entropy twin's."""
    folder = tmp_path_factory.mktemp("trained")
    configs = [
        tiny_config(folder, out=str(folder / "player")),
        tiny_config(folder, out=str(folder / "twin"), objective="cross_entropy", critic=None),
    ]
    for config in configs:
        train(config, quiet=True)
    return [Path(config.out) for config in configs]
