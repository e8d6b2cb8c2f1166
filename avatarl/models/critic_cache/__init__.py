"""A critic's answers on disk: computed once over the data, read in every epoch of every run."""

from avatarl.lazy import lazy_exports

__getattr__, __all__ = lazy_exports(
    __name__,
    {"read": ("CriticCache", "is_cache"), "record": ("RecordFormat",), "write": ("cache_critic",)},
)
