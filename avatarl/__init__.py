"""avatarl: training small language models from scratch with rewards instead of labels."""

from avatarl.lazy import lazy_exports

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "errors": ("UserError",),
        "version": ("__version__",),
        "objective": ("AvataRLConfig", "RewardLandscape", "avatarl_loss", "linear_avatarl_loss", "reward_landscape"),
    },
)
