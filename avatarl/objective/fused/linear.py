"""The public doors of the fused losses: checks, and the choice of implementation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import as_critics, check_floating, check_stored, check_targets, compute_dtype
from ..config import AvataRLConfig
from ..losses import AvataRL
from ..protocol import Objective, attach_gradients, kinds_of_stored, position_weights
from ..schedule import Scheduled
from ..stored import StoredCritic
from .chunked import Head, chunked_sums
from .implementations import choose
from .operator import one_operator


def linear_avatarl_loss(
    hidden: Tensor,
    head_weight: Tensor,
    critic_hidden: Tensor | StoredCritic | Sequence[Tensor | StoredCritic] | None,
    critic_head_weight: Tensor | Sequence[Tensor | None] | None,
    targets: Tensor,
    config: AvataRLConfig = AvataRLConfig.article(),
    ignore_index: int = -100,
    vocab_size: int | None = None,
    num_valid: Tensor | float | None = None,
    uniforms: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """The AvataRL loss from hidden states, in row chunks.

    Equal to this, which holds both models' logits for all positions at once::

        avatarl_loss(hidden @ head_weight.T, critic_hidden @ critic_head_weight.T, targets, config)

    Args:
        hidden: (…, d) floating, the player's last hidden states.
        head_weight: (V, d) floating, the player's output embedding.
        critic_hidden: (…, d_c) floating, or what a cache holds of the critic; a list for several critics, or None.
        critic_head_weight: (V, d_c) floating, None for a cached critic; a list, or None. No gradient flows to the
            critic.
        targets: (…) integer token ids.
        config, ignore_index, vocab_size, num_valid, uniforms: see :func:`avatarl.avatarl_loss`.
        impl: ``chunked``, ``compiled``, ``triton``, or ``auto`` for the one known to be good on this kind of device
            (:mod:`avatarl.objective.fused.implementations`).

    Returns:
        loss and metrics as :func:`avatarl.avatarl_loss`; gradients flow to ``hidden`` and ``head_weight``. Under
        autocast the products are taken in its dtype, the rest in float32.

    Raises:
        ValueError: Shapes or dtypes do not fit, or ``impl`` is unknown.
    """
    return linear_objective_loss(
        AvataRL(config),
        hidden,
        head_weight,
        critic_hidden,
        critic_head_weight,
        targets,
        ignore_index=ignore_index,
        vocab_size=vocab_size,
        num_valid=num_valid,
        uniforms=uniforms,
        impl=impl,
    )


def linear_objective_loss(
    objective: Objective,
    hidden: Tensor,
    head_weight: Tensor,
    critic_hidden: Tensor | StoredCritic | Sequence[Tensor | StoredCritic] | None,
    critic_head_weight: Tensor | Sequence[Tensor | None] | None,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    num_valid: Tensor | float | None = None,
    snapshot: tuple[Tensor, Tensor] | None = None,
    uniforms: Tensor | None = None,
    scheduled: Scheduled | None = None,
    impl: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Any objective's loss from hidden states; arguments as :func:`linear_avatarl_loss`.

    ``snapshot`` (hidden states and head weight of an earlier player) and ``uniforms`` (N, S) in [0, 1) are for the
    objectives that sample, ``scheduled`` for settings that change over time.
    """
    chosen = choose(impl, hidden.device.type)
    critic_hiddens, critic_weights = as_critics(critic_hidden), as_critics(critic_head_weight)
    if isinstance(critic_hidden, StoredCritic) and critic_head_weight is None:
        critic_weights = (None,)
    if len(critic_hiddens) != len(critic_weights):
        raise ValueError(f"{len(critic_hiddens)} critic_hidden but {len(critic_weights)} critic_head_weight given")
    vocabulary = head_weight.shape[0] if vocab_size is None else vocab_size
    player = _head("hidden", hidden, "head_weight", head_weight, targets, vocabulary)
    critics = []
    for states, weight in zip(critic_hiddens, critic_weights, strict=True):
        if isinstance(states, StoredCritic):
            check_stored(states, targets, vocabulary)
            critics.append(states.flat())
            continue
        if vocab_size is None and weight.shape[0] != head_weight.shape[0]:
            raise ValueError(
                f"critic_head_weight {tuple(weight.shape)} and head_weight {tuple(head_weight.shape)} have different "
                f"vocabularies; models padded to different widths need vocab_size"
            )
        critics.append(_head("critic_hidden", states, "critic_head_weight", weight, targets, vocabulary))
    earlier = None if snapshot is None else _head("snapshot", snapshot[0], "snapshot", snapshot[1], targets, vocabulary)

    flat_targets = targets.reshape(-1).long()
    objective.check_settings(vocabulary, len(critics), kinds_of_stored(critics))
    uniforms = objective.draws(uniforms, player.states)
    objective.check_inputs(earlier is not None, uniforms, flat_targets.numel())
    weights, safe_targets = position_weights(flat_targets, ignore_index, num_valid, compute_dtype(hidden.dtype))
    wants = (hidden.requires_grad and torch.is_grad_enabled(), head_weight.requires_grad and torch.is_grad_enabled())
    sums = one_operator if torch.compiler.is_compiling() else chunked_sums
    with torch.no_grad():
        player, critics = _in_product_dtype(player), [_in_product_dtype(critic) for critic in critics]
        earlier = None if earlier is None else _in_product_dtype(earlier)
        metrics, grad_hidden, grad_weight = sums(
            objective, player, critics, earlier, safe_targets, weights, uniforms, scheduled, wants, chosen
        )
    loss = attach_gradients(
        metrics["loss"],
        (hidden, head_weight),
        (
            None if grad_hidden is None else grad_hidden.reshape(hidden.shape),
            None if grad_weight is None else _padded_rows(grad_weight, head_weight.shape[0]),
        ),
    )
    return loss, metrics


def _head(states_name: str, states: Tensor, weight_name: str, weight: Tensor, targets: Tensor, vocabulary: int) -> Head:
    """Flatten and check one model's hidden states (…, d) and head weight (V, d)."""
    check_floating(states, states_name)
    check_floating(weight, weight_name)
    check_targets(targets, states, states_name)
    if weight.dim() != 2 or weight.shape[1] != states.shape[-1]:
        raise ValueError(
            f"{weight_name} {tuple(weight.shape)} does not fit {states_name} {tuple(states.shape)}; "
            f"expected (V, {states.shape[-1]})"
        )
    if not 1 <= vocabulary <= weight.shape[0]:
        raise ValueError(
            f"vocab_size is {vocabulary} but {weight_name} {tuple(weight.shape)} has {weight.shape[0]} rows; "
            f"expected 1 to {weight.shape[0]}"
        )
    autocasts = torch.is_autocast_enabled(states.device.type)
    if states.dtype != weight.dtype and not autocasts:
        raise ValueError(f"{states_name} is {states.dtype} and {weight_name} {weight.dtype}; expected one dtype")
    return Head(states.reshape(-1, states.shape[-1]), weight[:vocabulary])


def _in_product_dtype(head: Head | StoredCritic) -> Head | StoredCritic:
    """Cast once what every chunk's product would cast again: to autocast's dtype where it is on (float64 stays)."""
    if isinstance(head, StoredCritic):
        return head
    device_type = head.states.device.type
    if not torch.is_autocast_enabled(device_type) or torch.float64 in (head.states.dtype, head.weight.dtype):
        return head
    dtype = torch.get_autocast_dtype(device_type)
    return Head(head.states.to(dtype), head.weight.to(dtype))


def _padded_rows(gradient: Tensor, rows: int) -> Tensor:
    """Zeros below the gradient of the real vocabulary, where the head has padding rows."""
    missing = rows - gradient.shape[0]
    return torch.nn.functional.pad(gradient, (0, 0, 0, missing)) if missing else gradient
