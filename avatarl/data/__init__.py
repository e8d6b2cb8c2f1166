"""Text becomes tokens: sources, tokenizers, and the prepared folder that training reads."""

from avatarl.lazy import lazy_exports

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "dataset": ("PreparedData", "TokenStream", "WindowOrder", "Windows", "spread"),
        "prepare": ("prepare",),
    },
)
