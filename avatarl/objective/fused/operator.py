"""The chunked sums as one operator of a compiled graph.

``torch.compile`` would unroll the loop over chunks and trace the objective once for each. As an operator the loss is
one node of the graph around it, without a break, and runs inside as it does without a compiler.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import compute_dtype
from ..protocol import Objective, objective_from_spec
from ..schedule import Scheduled
from ..stored import StoredCritic
from .chunked import Head, chunked_sums

WIDTH = len(StoredCritic._fields)


def one_operator(
    objective: Objective,
    player: Head,
    critics: Sequence[Head | StoredCritic],
    snapshot: Head | None,
    targets: Tensor,
    weights: Tensor,
    uniforms: Tensor | None,
    scheduled: Scheduled | None,
    wants_gradients: tuple[bool, bool],
    impl: str,
) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
    """:func:`chunked_sums`, as one node of a graph."""
    stored = [critic for critic in critics if isinstance(critic, StoredCritic)]
    heads = [head for head in (*critics, snapshot) if isinstance(head, Head)]
    metrics, *gradients = torch.ops.avatarl.chunked_sums(
        *objective.spec,
        [isinstance(critic, StoredCritic) for critic in critics],
        *player,
        [head.states for head in heads],
        [head.weight for head in heads],
        [tensor for critic in stored for tensor in critic],
        targets,
        weights,
        uniforms,
        list(scheduled or ()),
        *wants_gradients,
        impl,
    )
    names = objective.metric_names(len(critics), len(stored))
    wanted = (gradient if wants else None for gradient, wants in zip(gradients, wants_gradients, strict=True))
    return dict(zip(names, metrics.unbind(), strict=True)), *wanted


@torch.library.custom_op("avatarl::chunked_sums", mutates_args=())
def _chunked_sums(
    objective: str,
    avatarl: str,
    baseline: str,
    is_stored: Sequence[bool],
    player_states: Tensor,
    player_weight: Tensor,
    other_states: Sequence[Tensor],
    other_weights: Sequence[Tensor],
    stored: Sequence[Tensor],
    targets: Tensor,
    weights: Tensor,
    uniforms: Tensor | None,
    scheduled: Sequence[Tensor],
    wants_states: bool,
    wants_weight: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Metrics in the order of their names (M,), and both gradients; an unwanted one is empty.

    ``is_stored`` says of each critic whether it comes from ``stored``, six tensors each, or from the others, of which
    one more than there are such critics is the snapshot.
    """
    heads = iter(Head(states, weight) for states, weight in zip(other_states, other_weights, strict=True))
    held = iter(StoredCritic(*stored[start : start + WIDTH]) for start in range(0, len(stored), WIDTH))
    critics = [next(held if is_held else heads) for is_held in is_stored]
    metrics, grad_states, grad_weight = chunked_sums(
        objective_from_spec(objective, avatarl, baseline),
        Head(player_states, player_weight),
        critics,
        next(heads, None),
        targets,
        weights,
        uniforms,
        Scheduled(*scheduled) if scheduled else None,
        (wants_states, wants_weight),
        impl,
    )
    nothing = player_states.new_empty(0)
    return (
        torch.stack(list(metrics.values())),
        nothing if grad_states is None else grad_states,
        nothing.clone() if grad_weight is None else grad_weight,
    )


@_chunked_sums.register_fake
def _(
    objective,
    avatarl,
    baseline,
    is_stored,
    player_states,
    player_weight,
    other_states,
    other_weights,
    stored,
    targets,
    weights,
    uniforms,
    scheduled,
    wants_states,
    wants_weight,
    impl,
):
    dtype = compute_dtype(player_states.dtype)
    names = objective_from_spec(objective, avatarl, baseline).metric_names(len(is_stored), sum(is_stored))

    def gradient(like: Tensor, wanted: bool) -> Tensor:
        return like.new_empty(like.shape, dtype=dtype) if wanted else like.new_empty(0)

    metrics = player_states.new_empty(len(names), dtype=dtype)
    return metrics, gradient(player_states, wants_states), gradient(player_weight, wants_weight)
