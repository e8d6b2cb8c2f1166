"""Active actions: the few tokens that are judged at a position.

Shapes: N positions, V vocabulary, K proposals per model, C critics, A = 1 + K + C·K columns. The width is fixed:
a token that was listed before is masked, never removed, so no shape depends on data and the host never waits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import compute_dtype
from .top_k import top_k as largest


def active_actions(
    player_logits: Tensor, critic_logits: Sequence[Tensor], targets: Tensor, top_k: int, top_p: float | None = None
) -> tuple[Tensor, Tensor]:
    """List the target, the player's proposals and each critic's proposals, each token once.

    Args:
        player_logits: (N, V) floating.
        critic_logits: C tensors (N, V) floating.
        targets: (N,) int64.
        top_k: K, proposals per model.
        top_p: Cut each model's proposals to the shortest prefix that reaches this probability.

    Returns:
        actions: (N, A) int64 token ids; column 0 is the target.
        valid: (N, A) bool, False where a column repeats an earlier active one or was cut by ``top_p``.
    """
    columns = [targets.unsqueeze(1)]  # (N, 1), then (N, K) each
    masks = [torch.ones_like(columns[0], dtype=torch.bool)]
    for logits in (player_logits, *critic_logits):
        tokens, kept = _proposals(logits, top_k, top_p)
        for earlier, earlier_kept in zip(columns, masks, strict=True):
            same = tokens.unsqueeze(2) == earlier.unsqueeze(1)  # (N, K, columns of the earlier list)
            kept = kept & ~(same & earlier_kept.unsqueeze(1)).any(dim=2)
        columns.append(tokens)
        masks.append(kept)
    return torch.cat(columns, dim=1), torch.cat(masks, dim=1)


def _proposals(logits: Tensor, top_k: int, top_p: float | None) -> tuple[Tensor, Tensor]:
    """One model's ``top_k`` tokens in falling order, and which of them ``top_p`` keeps; both (N, K)."""
    values, tokens = largest(logits, top_k)
    if top_p is None or top_p == 1:  # a sum that reaches exactly 1 would be an accident of rounding
        return tokens, torch.ones_like(tokens, dtype=torch.bool)
    dtype = compute_dtype(logits.dtype)
    probs = (values.to(dtype) - logits.to(dtype).logsumexp(dim=-1, keepdim=True)).exp()
    probability_before = probs.cumsum(dim=-1) - probs
    # The first token stays whatever the rounding of a sum minus its only term.
    probability_before[:, 0].zero_()
    return tokens, probability_before < top_p
