"""One readable loop for every objective, on native PyTorch."""

from .config import GuardConfig, OptimConfig, Schedule, ScheduleConfig, TrainConfig
from .trainer import train

__all__ = ["GuardConfig", "OptimConfig", "Schedule", "ScheduleConfig", "TrainConfig", "train"]
