"""Caches of each kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from avatarl.data import PreparedData
from avatarl.models import cache_critic
from avatarl.models.critic_cache import parts

from ..conftest import BLOCK

COMMON = dict(block_size=BLOCK, precision="fp32", device="cpu", quiet=True)


@pytest.fixture(scope="module")
def data(data_folder: Path) -> PreparedData:
    return PreparedData.open(data_folder)


@pytest.fixture(scope="module")
def caches(tmp_path_factory, data_folder: Path, critic_folder: Path) -> dict[str, Path]:
    """One of each kind, and one that keeps the largest exactly."""
    folder = tmp_path_factory.mktemp("caches")
    kinds = {
        "top": dict(kind="top", bytes_per_token=54),
        "sample": dict(kind="sample", bytes_per_token=54),
        "both": dict(kind="sample", bytes_per_token=54, keep_top=5),
    }
    for name, settings in kinds.items():
        cache_critic(str(critic_folder), data_folder, folder / name, **settings, **COMMON)
    return {name: folder / name for name in kinds}


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of eight windows or so, of which the tiny data has some."""
    monkeypatch.setattr(parts, "SMALLEST_PART_BYTES", 1 << 13)
