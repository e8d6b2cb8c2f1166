"""Players, the models that learn, and critics, the frozen ones that judge. Both are transformers models."""

from .counting import ParameterCount, count_parameters, forward_flops_per_token, training_flops_per_token
from .critic_cache import CriticCache, cache_critic
from .critics import check_same_vocabulary, load_critic
from .loading import load_model, load_tokenizer
from .players import PRESETS, PlayerConfig, build_player

__all__ = [
    "PRESETS",
    "CriticCache",
    "ParameterCount",
    "PlayerConfig",
    "build_player",
    "cache_critic",
    "check_same_vocabulary",
    "count_parameters",
    "forward_flops_per_token",
    "load_critic",
    "load_model",
    "load_tokenizer",
    "training_flops_per_token",
]
