"""What a run will take, before it is started: FLOPs, memory, time and disk."""

from avatarl.lazy import lazy_exports

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "plan": ("UTILISATION", "Plan", "plan"),
        "table": ("plan_table",),
    },
)
