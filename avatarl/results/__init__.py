"""Readers of finished models and run folders: numbers, texts and pictures that a person can look at."""

from avatarl.lazy import lazy_exports

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "pictures": ("draw_curves",),
        "evaluate": ("evaluate",),
        "generate": ("generate",),
        "harness": ("open_tasks", "run_tasks"),
        "minimal_pairs": ("read_pairs", "score_pairs"),
        "publish": ("push_to_hub",),
        "runs": ("read_metrics",),
    },
)
