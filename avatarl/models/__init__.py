"""Players, the models that learn, and critics, the frozen ones they learn from. Both are transformers models."""

from avatarl.lazy import lazy_exports

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "config": ("PRESETS", "PlayerConfig"),
        "counting": ("ParameterCount", "count_parameters", "forward_flops_per_token", "training_flops_per_token"),
        "critic_cache": ("CriticCache", "cache_critic"),
        "critics": ("Critic", "check_same_vocabulary", "load_critic", "open_critic"),
        "loading": ("load_model", "load_tokenizer"),
        "players": ("build_player",),
        "verify": ("verify",),
    },
)
