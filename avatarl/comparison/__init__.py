"""Arms by seeds: runs that differ in what is compared and in nothing else, and what can be said of the difference."""

from avatarl.lazy import lazy_exports

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "compare": ("compare",),
        "config": ("ComparisonConfig", "TuningConfig"),
    },
)
