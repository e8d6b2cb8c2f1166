"""One readable loop for every objective, on native PyTorch."""

from avatarl.lazy import lazy_exports

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "config": ("GuardConfig", "OptimConfig", "Schedule", "ScheduleConfig", "TrainConfig"),
        "run": ("train",),
    },
)
