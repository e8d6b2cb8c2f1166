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
from .chunked import Head, chunked_sums


def one_operator(
    objective: Objective,
    player: Head,
    critics: Sequence[Head],
    snapshot: Head | None,
    targets: Tensor,
    weights: Tensor,
    uniforms: Tensor | None,
    wants_gradients: tuple[bool, bool],
    impl: str,
) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
    """:func:`chunked_sums`, as one node of a graph."""
    others = [*critics, *([] if snapshot is None else [snapshot])]
    metrics, *gradients = torch.ops.avatarl.chunked_sums(
        *objective.spec,
        len(critics),
        *player,
        [head.states for head in others],
        [head.weight for head in others],
        targets,
        weights,
        uniforms,
        *wants_gradients,
        impl,
    )
    names = objective.metric_names(len(critics))
    wanted = (gradient if wants else None for gradient, wants in zip(gradients, wants_gradients, strict=True))
    return dict(zip(names, metrics.unbind(), strict=True)), *wanted


@torch.library.custom_op("avatarl::chunked_sums", mutates_args=())
def _chunked_sums(
    objective: str,
    avatarl: str,
    baseline: str,
    num_critics: int,
    player_states: Tensor,
    player_weight: Tensor,
    other_states: Sequence[Tensor],
    other_weights: Sequence[Tensor],
    targets: Tensor,
    weights: Tensor,
    uniforms: Tensor | None,
    wants_states: bool,
    wants_weight: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Metrics in the order of their names (M,), and both gradients; an unwanted one is empty."""
    others = [Head(states, weight) for states, weight in zip(other_states, other_weights, strict=True)]
    metrics, grad_states, grad_weight = chunked_sums(
        objective_from_spec(objective, avatarl, baseline),
        Head(player_states, player_weight),
        others[:num_critics],
        others[num_critics] if len(others) > num_critics else None,
        targets,
        weights,
        uniforms,
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
    num_critics,
    player_states,
    player_weight,
    other_states,
    other_weights,
    targets,
    weights,
    uniforms,
    wants_states,
    wants_weight,
    impl,
):
    dtype = compute_dtype(player_states.dtype)
    names = objective_from_spec(objective, avatarl, baseline).metric_names(num_critics)

    def gradient(like: Tensor, wanted: bool) -> Tensor:
        return like.new_empty(like.shape, dtype=dtype) if wanted else like.new_empty(0)

    metrics = player_states.new_empty(len(names), dtype=dtype)
    return metrics, gradient(player_states, wants_states), gradient(player_weight, wants_weight)
