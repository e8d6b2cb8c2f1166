"""The method: rewards for a few candidate tokens, and the losses made of them. Pure torch."""

from . import baselines as baselines
from .config import AvataRLConfig, BaselineConfig
from .fused import linear_avatarl_loss, linear_objective_loss
from .losses import AvataRL, avatarl_loss
from .protocol import OBJECTIVES, Objective, make_objective, objective_loss
from .rewards import RewardLandscape, reward_landscape
from .schedule import Scheduled
from .stored import StoredCritic

__all__ = [
    "OBJECTIVES",
    "AvataRL",
    "AvataRLConfig",
    "BaselineConfig",
    "Objective",
    "RewardLandscape",
    "Scheduled",
    "StoredCritic",
    "avatarl_loss",
    "linear_avatarl_loss",
    "linear_objective_loss",
    "make_objective",
    "objective_loss",
    "reward_landscape",
]
