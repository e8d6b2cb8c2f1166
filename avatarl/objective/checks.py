"""Shapes and dtypes at the public doors of the objective: what fits goes on flat, what does not is named."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .stored import StoredCritic


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32 for half precision, otherwise the input's own."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def as_critics(critics) -> Sequence:
    """One critic, several or none, as a sequence; None in a list stays."""
    if critics is None:
        return ()
    # What is stored of a critic is a tuple itself.
    return (critics,) if isinstance(critics, (Tensor, StoredCritic)) else critics


def check_logits(
    player_logits: Tensor,
    critic_logits: Tensor | StoredCritic | Sequence[Tensor | StoredCritic] | None,
    targets: Tensor,
    vocab_size: int | None,
) -> tuple[Tensor, list[Tensor | StoredCritic], Tensor]:
    """Flatten (…, V) logits and (…) targets to (N, vocab_size), a list of such, and (N,) int64.

    Raises:
        ValueError: with the shapes or dtypes found.
    """
    critics = list(as_critics(critic_logits))
    check_targets(targets, player_logits, "player_logits")
    check_floating(player_logits, "player_logits")
    vocabulary = player_logits.shape[-1] if vocab_size is None else vocab_size
    _check_vocabulary(vocabulary, player_logits, "player_logits")
    for critic in critics:
        if isinstance(critic, StoredCritic):
            check_stored(critic, targets, vocabulary)
            continue
        check_floating(critic, "critic_logits")
        check_targets(targets, critic, "critic_logits")
        if vocab_size is None and critic.shape != player_logits.shape:
            raise ValueError(
                f"critic_logits {tuple(critic.shape)} and player_logits {tuple(player_logits.shape)} differ; "
                f"models padded to different widths need vocab_size"
            )
        _check_vocabulary(vocabulary, critic, "critic_logits")
    player, *judges = (
        scores.flat() if isinstance(scores, StoredCritic) else scores.reshape(-1, scores.shape[-1])[:, :vocabulary]
        for scores in (player_logits, *critics)
    )
    return player, judges, targets.reshape(-1).long()


def check_stored(critic: StoredCritic, targets: Tensor, vocabulary: int) -> None:
    """Raise unless what is stored is of the targets' positions and vocabulary."""
    if critic.log_rest.shape != targets.shape:
        raise ValueError(f"stored critic {tuple(critic.log_rest.shape)} does not fit targets {tuple(targets.shape)}")
    if critic.vocab_size != vocabulary:
        raise ValueError(f"stored critic has {critic.vocab_size} tokens; expected the player's {vocabulary}")


def check_floating(tensor: Tensor, name: str) -> None:
    """Raise unless the tensor is floating."""
    if not tensor.is_floating_point():
        raise ValueError(f"{name} has dtype {tensor.dtype}; expected a floating dtype")


def check_targets(targets: Tensor, scores: Tensor, name: str) -> None:
    """Raise unless integer ``targets`` (…) match the leading dimensions of ``scores`` (…, d)."""
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets have dtype {targets.dtype}; expected integer token ids")
    if scores.dim() < 1 or scores.shape[:-1] != targets.shape:
        raise ValueError(
            f"{name} {tuple(scores.shape)} do not fit targets {tuple(targets.shape)}; "
            f"expected {(*targets.shape, scores.shape[-1] if scores.dim() else 'V')}"
        )


def _check_vocabulary(vocabulary: int, logits: Tensor, name: str) -> None:
    if not 1 <= vocabulary <= logits.shape[-1]:
        raise ValueError(
            f"vocab_size is {vocabulary} but {name} {tuple(logits.shape)} have {logits.shape[-1]} columns; "
            f"expected 1 to {logits.shape[-1]}"
        )
