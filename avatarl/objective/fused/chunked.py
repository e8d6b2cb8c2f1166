"""Row chunks: logits, scores and closed-form gradients of some positions at a time, on any device and in any dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import compute_dtype
from ..protocol import Objective, Rows, weighted_sums
from ..schedule import Scheduled
from ..stored import StoredCritic
from .implementations import kernels

# A chunk's rows: enough for the products to be efficient, few enough to hold two models' logits of them at once. Timed
# on two AVX-512 cores, from 32 to 2,048 rows at vocabularies of 4,096 and 50,257 (docs/lab-log.md); those for CUDA are
# a guess. The elements of one model's logits bound the memory.
CHUNK_ROWS = {"cpu": 2**10, "cuda": 2**14}
CHUNK_ELEMENTS = {"cpu": 2**25, "cuda": 2**25}


class Head(NamedTuple):
    """One model's last hidden states (N, d) and its head weight (V, d)."""

    states: Tensor
    weight: Tensor


def chunked_sums(
    objective: Objective,
    player: Head,
    critics: Sequence[Head | StoredCritic],
    snapshot: Head | None,
    targets: Tensor,
    weights: Tensor,
    uniforms: Tensor | None,
    scheduled: Scheduled | None,
    wants_gradients: tuple[bool, bool],
    impl: str = "chunked",
) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
    """Score all positions chunk by chunk, without autograd.

    Args:
        targets: (N,) int64, a real id everywhere.
        weights: (N,) what each position counts.
        uniforms: (N, S) in [0, 1), or None.
        scheduled: Values of settings that change over time, or None.
        wants_gradients: Whether to compute the gradient over the player's states, and over its head weight.
        impl: What reads the logits; see :mod:`.implementations`.

    Returns:
        Metrics summed with ``weights`` (scalars), and the gradients of the loss over the player's states (N, d) and
        over its head weight (V, d), both in float32 or float64; None where not wanted.
    """
    num_positions, vocabulary = player.states.shape[0], player.weight.shape[0]
    dtype = compute_dtype(player.states.dtype)
    wants_states, wants_weight = wants_gradients
    # Contiguous whatever the inputs are: the operator of a compiled graph promises so.
    grad_states = player.states.new_empty(player.states.shape, dtype=dtype) if wants_states else None
    grad_weight = player.weight.new_zeros(player.weight.shape, dtype=dtype) if wants_weight else None

    # The products see weights of up to 1 and the gradients are scaled at the end: 1/M would underflow in float16.
    largest = weights.amax() if num_positions else weights.sum()
    relative = weights / largest.clamp(min=torch.finfo(dtype).tiny)
    ignored = weights == 0
    rows = chunk_rows(num_positions, vocabulary, player.states.device)
    # Written anew by every chunk: fresh memory would cost as much as computing what goes into it.
    readers = [_reader(head, rows, ignored) for head in (player, *critics, *([snapshot] if snapshot else []))]
    partial = None if grad_weight is None or player.weight.dtype == dtype else torch.empty_like(player.weight)
    totals: dict[str, Tensor] = {}
    with torch.autocast(player.states.device.type, enabled=False):
        for start in range(0, num_positions, rows) if num_positions else (0,):
            chunk = slice(start, start + rows)
            player_logits, *others = (read(chunk) for read in readers)
            scores = objective.score(
                Rows(
                    player_logits,
                    others[: len(critics)],
                    targets[chunk],
                    relative[chunk],
                    others[-1] if snapshot else None,
                    None if uniforms is None else uniforms[chunk],
                    kernels(impl),
                    scheduled,
                ),
                with_gradient=wants_states or wants_weight,
            )
            for name, value in weighted_sums(scores.metrics, weights[chunk]).items():
                totals[name] = totals[name] + value if name in totals else value
            if scores.gradient is None:
                continue
            gradient = scores.gradient.to(player.weight.dtype)  # (rows, V)
            if wants_states:
                _product_into(grad_states[chunk], gradient, player.weight)
            if wants_weight:
                _add_product(grad_weight, gradient.t(), _counted(player.states[chunk], ignored[chunk]), partial)
    for gradient in (grad_states, grad_weight):
        if gradient is not None:
            gradient.mul_(largest)
    return totals, grad_states, grad_weight


def chunk_rows(num_positions: int, vocabulary: int, device: torch.device) -> int:
    """How many positions one chunk holds: chunks of equal size, none empty."""
    kind = device.type if device.type in CHUNK_ROWS else "cuda"
    most = max(1, min(CHUNK_ROWS[kind], CHUNK_ELEMENTS[kind] // vocabulary))
    num_chunks = max(1, -(-num_positions // most))
    return max(1, -(-num_positions // num_chunks))


def _reader(head: Head | StoredCritic, rows: int, ignored: Tensor) -> Callable[[slice], Tensor | StoredCritic]:
    """What gives one model's logits of a chunk, in the products' dtype and always in the same memory."""
    if isinstance(head, StoredCritic):
        return lambda chunk: _counted(head.rows(chunk), ignored[chunk])
    memory = head.states.new_empty(rows, head.weight.shape[0])

    def logits(chunk: slice) -> Tensor:
        states = _counted(head.states[chunk], ignored[chunk])
        return torch.mm(states, head.weight.t(), out=memory[: states.shape[0]])

    return logits


def _counted(numbers: Tensor | StoredCritic, ignored: Tensor) -> Tensor | StoredCritic:
    """Numbers (n, …) with 0 at ignored positions (n,): padding may hold NaN, and 0 · NaN is one."""
    if isinstance(numbers, StoredCritic):
        names = ("log_probs", "log_rest", "entropy")
        return numbers._replace(**{name: _counted(getattr(numbers, name), ignored) for name in names})
    return numbers.masked_fill(ignored.view(-1, *[1] * (numbers.dim() - 1)), 0.0)


def _product_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out = left @ right, whatever the dtype of ``out``."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)


def _add_product(total: Tensor, left: Tensor, right: Tensor, partial: Tensor | None) -> None:
    """total += left @ right, summed in the dtype of ``total``; ``partial`` holds a product in another dtype."""
    if partial is None:
        total.addmm_(left, right)
    else:
        total += torch.mm(left, right, out=partial)
