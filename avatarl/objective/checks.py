"""Shapes and dtypes that the public functions accept; a refusal names what was found."""

from __future__ import annotations

import torch
from torch import Tensor


def check_logits(logits: Tensor, name: str, targets: Tensor, vocab_size: int | None) -> None:
    """Raise a ValueError unless ``logits`` (…, V) are floating, fit ``targets`` (…) and have ``vocab_size`` columns."""
    check_targets(targets, logits, name)
    check_floating(logits, name)
    _check_vocabulary(vocab_size, logits, name, "columns", -1)


def check_critic_logits(logits: Tensor, targets: Tensor, width: int, vocab_size: int | None) -> None:
    """Raise a ValueError unless a critic's logits (…, V) fit ``targets`` (…) and a player with ``width`` columns."""
    check_floating(logits, "critic_logits")
    check_targets(targets, logits, "critic_logits")
    if vocab_size is None and logits.shape[-1] != width:
        raise ValueError(
            f"critic_logits {tuple(logits.shape)} and player_logits {(*targets.shape, width)} differ; "
            f"models padded to different widths need vocab_size"
        )
    _check_vocabulary(vocab_size, logits, "critic_logits", "columns", -1)


def check_head(
    states_name: str, states: Tensor, weight_name: str, weight: Tensor, targets: Tensor, vocab_size: int
) -> None:
    """Raise a ValueError unless hidden states (…, d) and a head weight (V, d) fit each other and ``targets`` (…)."""
    check_floating(states, states_name)
    check_floating(weight, weight_name)
    check_targets(targets, states, states_name)
    if weight.dim() != 2 or weight.shape[1] != states.shape[-1]:
        raise ValueError(
            f"{weight_name} {tuple(weight.shape)} does not fit {states_name} {tuple(states.shape)}; "
            f"expected (V, {states.shape[-1]})"
        )
    _check_vocabulary(vocab_size, weight, weight_name, "rows", 0)
    if states.dtype != weight.dtype and not torch.is_autocast_enabled(states.device.type):
        raise ValueError(f"{states_name} is {states.dtype} and {weight_name} {weight.dtype}; expected one dtype")


def check_cached(log_rest: Tensor, cached_vocabulary: int, targets: Tensor, vocab_size: int) -> None:
    """Raise a ValueError unless cached answers are of the positions of ``targets`` (…) and of ``vocab_size`` tokens."""
    if log_rest.shape != targets.shape:
        raise ValueError(f"cached critic {tuple(log_rest.shape)} does not fit targets {tuple(targets.shape)}")
    if cached_vocabulary != vocab_size:
        raise ValueError(f"cached critic has {cached_vocabulary} tokens; expected the player's {vocab_size}")


def check_floating(tensor: Tensor, name: str) -> None:
    """Raise a ValueError unless the tensor is floating."""
    if not tensor.is_floating_point():
        raise ValueError(f"{name} has dtype {tensor.dtype}; expected a floating dtype")


def check_targets(targets: Tensor, scores: Tensor, name: str) -> None:
    """Raise a ValueError unless integer ``targets`` (…) match the leading dimensions of ``scores`` (…, d)."""
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets have dtype {targets.dtype}; expected integer token ids")
    if scores.dim() < 1 or scores.shape[:-1] != targets.shape:
        raise ValueError(
            f"{name} {tuple(scores.shape)} do not fit targets {tuple(targets.shape)}; "
            f"expected {(*targets.shape, scores.shape[-1] if scores.dim() else 'V')}"
        )


def _check_vocabulary(vocab_size: int | None, tensor: Tensor, name: str, of: str, dim: int) -> None:
    found, verb = tensor.shape[dim], "have" if name.endswith("s") else "has"
    if vocab_size is not None and not 1 <= vocab_size <= found:
        raise ValueError(
            f"vocab_size is {vocab_size} but {name} {tuple(tensor.shape)} {verb} {found} {of}; expected 1 to {found}"
        )
