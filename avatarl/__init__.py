"""avatarl: training small language models from scratch with rewards instead of labels."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .errors import UserError
from .version import __version__

if TYPE_CHECKING:
    from .objective import AvataRLConfig, RewardLandscape, avatarl_loss, linear_avatarl_loss, reward_landscape

# Fetched when first asked for: importing torch takes seconds, and the command line sets up its process before that.
_FROM_OBJECTIVE = ("AvataRLConfig", "RewardLandscape", "avatarl_loss", "linear_avatarl_loss", "reward_landscape")

__all__ = [
    "AvataRLConfig",
    "RewardLandscape",
    "UserError",
    "__version__",
    "avatarl_loss",
    "linear_avatarl_loss",
    "reward_landscape",
]


def __getattr__(name: str):
    if name in _FROM_OBJECTIVE:
        return getattr(import_module("avatarl.objective"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
