"""Readers of finished models and run folders: numbers, texts and pictures that a person can look at."""

from .curves import draw_curves
from .evaluate import evaluate
from .generate import generate
from .harness import open_tasks, run_tasks
from .minimal_pairs import read_pairs, score_pairs
from .publish import push_to_hub
from .runs import read_metrics

__all__ = [
    "draw_curves",
    "evaluate",
    "generate",
    "open_tasks",
    "push_to_hub",
    "read_metrics",
    "read_pairs",
    "run_tasks",
    "score_pairs",
]
