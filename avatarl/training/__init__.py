"""One readable loop for every objective, on native PyTorch."""

from .config import OptimConfig, TrainConfig
from .trainer import train

__all__ = ["OptimConfig", "TrainConfig", "train"]
