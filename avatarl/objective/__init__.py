"""The method: rewards for a few candidate tokens, and the losses made of them. Pure torch."""

from avatarl.lazy import lazy_exports

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "config": ("OBJECTIVES", "AvataRLConfig", "BaselineConfig"),
        "answers": ("Answers", "CachedAnswers", "HiddenAnswers", "LiveAnswers"),
        "engine": ("avatarl_loss", "linear_avatarl_loss", "linear_objective_loss", "objective_loss"),
        "objectives": ("AvataRL", "Objective", "make_objective"),
        "rewards": ("RewardLandscape", "reward_landscape"),
        "schedule": ("Scheduled",),
    },
)
