"""A second critic, and two runs of training."""

from __future__ import annotations

from pathlib import Path

import pytest

from avatarl.models import PlayerConfig
from avatarl.training import train

from ..conftest import TINY, save_model


@pytest.fixture(scope="session")
def second_critic(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A wider critic, that agrees with the first about nothing."""
    wider = PlayerConfig(settings={**TINY, "hidden_size": 24})
    return save_model(tmp_path_factory.mktemp("second") / "model", tokenizer, seed=8, factor=20, player=wider)


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
