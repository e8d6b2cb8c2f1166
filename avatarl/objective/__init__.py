"""The method: rewards for a few candidate tokens, and the losses made of them. Pure torch."""

from avatarl.lazy import lazy_exports

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "config": ("AvataRLConfig", "BaselineConfig"),
        "fused": ("linear_avatarl_loss", "linear_objective_loss"),
        "losses": ("AvataRL", "avatarl_loss"),
        "baselines": ("OBJECTIVES", "make_objective"),
        "protocol": ("Objective", "objective_loss"),
        "rewards": ("RewardLandscape", "reward_landscape"),
        "schedule": ("Scheduled",),
        "stored": ("StoredCritic",),
    },
)
