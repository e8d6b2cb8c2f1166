"""avatarl: training small language models from scratch with rewards instead of labels."""

from .errors import UserError
from .objective import AvataRLConfig, RewardLandscape, avatarl_loss, linear_avatarl_loss, reward_landscape
from .version import __version__

__all__ = [
    "AvataRLConfig",
    "RewardLandscape",
    "UserError",
    "__version__",
    "avatarl_loss",
    "linear_avatarl_loss",
    "reward_landscape",
]
