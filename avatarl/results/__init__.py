"""Readers of finished models and run folders: numbers, texts and pictures that a person can look at."""

from .curves import draw_curves
from .evaluate import evaluate
from .generate import generate
from .runs import read_metrics

__all__ = ["draw_curves", "evaluate", "generate", "read_metrics"]
