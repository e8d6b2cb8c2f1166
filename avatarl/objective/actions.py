"""Active actions: the few tokens that are judged at a position.

Shapes: N positions, V vocabulary, K proposals per model, C critics, A = 1 + K + C·K columns, less where a cache
stores fewer than K tokens or the player proposes none. A token that was listed before is masked, never removed: no
shape depends on data, and the host never waits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .critics import as_asked, proposals
from .stored import StoredCritic


def active_actions(
    player_logits: Tensor,
    critics: Sequence[Tensor | StoredCritic],
    targets: Tensor,
    top_k: int,
    top_p: float | None = None,
    player_proposes: bool = True,
) -> tuple[Tensor, Tensor]:
    """List the target, the player's proposals and each critic's proposals, each token once.

    Args:
        player_logits: (N, V) floating.
        critics: C of them, logits (N, V) floating or what is stored of N positions.
        targets: (N,) int64.
        top_k: K, proposals per model.
        top_p: Cut each model's proposals to the shortest prefix that reaches this probability.
        player_proposes: Whether the player's proposals are listed.

    Returns:
        actions: (N, A) int64 token ids; column 0 is the target.
        valid: (N, A) bool, False where a column repeats an earlier active one or was cut by ``top_p``.
    """
    columns = [targets.unsqueeze(1)]  # (N, 1), then (N, K) each
    masks = [torch.ones_like(columns[0], dtype=torch.bool)]
    lists = [proposals(player_logits, top_k, top_p)] if player_proposes else []
    lists += [as_asked(critic).proposals(top_k, top_p) for critic in critics]
    for tokens, kept in lists:
        for earlier, earlier_kept in zip(columns, masks, strict=True):
            same = tokens.unsqueeze(2) == earlier.unsqueeze(1)  # (N, K, columns of the earlier list)
            kept = kept & ~(same & earlier_kept.unsqueeze(1)).any(dim=2)
        columns.append(tokens)
        masks.append(kept)
    return torch.cat(columns, dim=1), torch.cat(masks, dim=1)


def first_proposals(critics: Sequence[Tensor | StoredCritic], top_k: int, player_proposes: bool = True) -> list[int]:
    """The column of each critic's favourite among :func:`active_actions`; none for a cache that stores no proposals."""
    columns, column = [], 1 + top_k * player_proposes
    for critic in critics:
        width = min(top_k, critic.num_top) if isinstance(critic, StoredCritic) else top_k
        if width:
            columns.append(column)
        column += width
    return columns


def sums_of_each(tokens: Tensor, amounts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``tokens`` (N, S) in order, which of them come for the first time, and the sum of the amounts of all alike."""
    tokens, order = tokens.sort(dim=1)
    is_first = torch.cat([torch.ones_like(tokens[:, :1], dtype=torch.bool), tokens[:, 1:] != tokens[:, :-1]], dim=1)
    group = is_first.cumsum(dim=1) - 1  # (N, S)
    sums = torch.zeros_like(amounts).scatter_add_(1, group, amounts.gather(1, order))
    return tokens, is_first, sums.gather(1, group)
