"""The same losses from hidden states and head weights; no (N, V) tensor is ever held for all N."""

from .linear import linear_avatarl_loss, linear_objective_loss

__all__ = ["linear_avatarl_loss", "linear_objective_loss"]
