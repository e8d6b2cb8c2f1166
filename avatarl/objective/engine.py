"""The loss over logits and over hidden states: chunks of rows, gradients in closed form, an optional compiled pass.

From hidden states, no (N, V) tensor is ever held for all N: logits, losses and gradients of some rows exist at a time.

Shapes: N positions, V vocabulary, d hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .answers import BY_NUMBER_OF_TENSORS, Answers, CachedAnswers, HiddenAnswers, as_answers
from .config import AvataRLConfig
from .objectives import AvataRL, LossInputs, Objective, objective_from_spec
from .policy import compute_dtype
from .rewards import flat_logits
from .schedule import Scheduled

# A chunk's rows: enough for the products to be efficient, few enough to hold two models' logits of them at once. Timed
# on two AVX-512 cores, from 32 to 2,048 rows at vocabularies of 4,096 and 50,257 (docs/lab-log.md); those for CUDA are
# a guess. The elements of one model's logits bound the memory.
CHUNK_ROWS = {"cpu": 2**10, "cuda": 2**14}
CHUNK_ELEMENTS = {"cpu": 2**25, "cuda": 2**25}

# ``chunked`` is eager PyTorch on any device. ``compiled`` makes the passes over the logits through torch.compile: needs
# a C++ compiler on a CPU, Triton on a GPU, and some seconds at the first call, so ``auto`` is ``chunked``.
IMPLEMENTATIONS = {"auto": "chunked", "chunked": "chunked", "compiled": "compiled"}


# --- from logits -----------------------------------------------------------------------------------------------------


def avatarl_loss(
    player_logits: Tensor,
    critic_logits: Tensor | CachedAnswers | Sequence[Tensor | CachedAnswers] | None,
    targets: Tensor,
    config: AvataRLConfig = AvataRLConfig.article(),
    ignore_index: int = -100,
    vocab_size: int | None = None,
    num_valid: Tensor | float | None = None,
    uniforms: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The AvataRL loss from materialised logits.

    It is this, without the intermediate tensors and with the gradient in closed form::

        landscape = reward_landscape(player_logits, critic_logits, targets, config)
        log_pi = player_logits.log_softmax(-1)
        entropy = -(log_pi.exp() * log_pi).sum(-1)
        loss = (-(landscape.rewards * log_pi.gather(1, landscape.actions)).sum(1) - 0.01 * entropy).mean()

    Args:
        player_logits: (…, V) floating, requires grad. Half precision is computed in float32, float64 in float64.
        critic_logits: (…, V) floating, or what a cache holds of the critic; a list for several critics; None when
            ``config.critic_weight`` is 0.
        targets: (…) integer token ids.
        config: The settings.
        ignore_index: Positions with this target count nothing, whatever stands there.
        vocab_size: Ids from here on are padding of the embedding: never active, outside every softmax.
        num_valid: M, what the sum over positions is divided by, a number or tensor () of any dtype; the positions not
            ignored when None. Pass the count of the whole optimiser step under gradient accumulation: losses and
            metrics of its parts then add up. With M = 0 loss and gradient are 0.
        uniforms: (N, 1) in [0, 1), for the tokens that ``tail="sample"`` draws; torch's own when None.

    Returns:
        loss: scalar, in float32 or float64; NaN where a model's logits at a counted position have no softmax.
        metrics: scalar tensors on the device, detached, divided by M as the loss is (docs/metrics.md).

    Raises:
        ValueError: Shapes or dtypes do not fit, or ``top_k`` is larger than the vocabulary.

    Source: tokenbender, "avatarl: training language models from scratch with pure reinforcement learning", 2025.
    """
    return objective_loss(
        AvataRL(config),
        player_logits,
        critic_logits,
        targets,
        ignore_index=ignore_index,
        vocab_size=vocab_size,
        num_valid=num_valid,
        uniforms=uniforms,
    )


def objective_loss(
    objective: Objective,
    player_logits: Tensor,
    critic_logits: Tensor | Answers | Sequence[Tensor | Answers] | None,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    num_valid: Tensor | float | None = None,
    snapshot_logits: Tensor | None = None,
    uniforms: Tensor | None = None,
    scheduled: Scheduled | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Any objective's loss over materialised logits; :func:`avatarl.avatarl_loss` describes the arguments.

    ``snapshot_logits`` (…, V) and ``uniforms`` (N, S) are for the objectives that sample, ``scheduled`` for settings
    that change over time.
    """
    critics, snapshot = as_answers(critic_logits), as_answers(snapshot_logits)
    player, models = flat_logits(player_logits, [*critics, *snapshot], targets, vocab_size)
    objective.check_settings(player.shape[-1], [critic.limits for critic in critics])
    uniforms = _with_tail_uniforms(objective, uniforms, targets)
    objective.check_inputs(bool(snapshot), uniforms, targets.numel())
    dtype = compute_dtype(player.dtype)
    weights, safe_targets = position_weights(targets.reshape(-1).long(), ignore_index, num_valid, dtype)
    wants_gradient = player.requires_grad and torch.is_grad_enabled()
    with torch.no_grad(), torch.autocast(player.device.type, enabled=False):  # autocast would take vecdot in half
        answers = [model.cast(dtype) for model in models]
        inputs = LossInputs(
            player.to(dtype, copy=wants_gradient),  # the caller's logits stay as they are
            answers[: len(critics)],
            safe_targets,
            weights,
            answers[-1].logits if snapshot else None,
            uniforms,
            scheduled,
        )
        gradient, metrics = objective.loss_and_gradient(inputs, wants_gradient)
        if wants_gradient:  # 0 · NaN, where padding holds NaN
            gradient.masked_fill_((weights == 0).unsqueeze(1), 0.0)
        metrics = _weighted_sums(metrics, weights)
    return _with_gradients(metrics["loss"], (player,), (gradient,)), metrics


# --- from hidden states ----------------------------------------------------------------------------------------------


def linear_avatarl_loss(
    hidden: Tensor,
    head_weight: Tensor,
    critic_hidden: Tensor | CachedAnswers | Sequence[Tensor | CachedAnswers] | None,
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
        impl: ``chunked``, ``compiled``, or ``auto`` for the one known to be good on this kind of device.

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
    critic_hidden: Tensor | Answers | Sequence[Tensor | Answers] | None,
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
    compiled = is_compiled(impl)
    critics, width = as_answers(critic_hidden, critic_head_weight), head_weight.shape[0]
    vocabulary = width if vocab_size is None else vocab_size
    player, earlier = HiddenAnswers(hidden, head_weight), None if snapshot is None else HiddenAnswers(*snapshot)
    player.check(targets, None, vocabulary, ("hidden", "head_weight"))
    for critic in critics:
        critic.check(targets, width, vocab_size)
    if earlier is not None:
        earlier.check(targets, None, vocabulary, ("snapshot", "snapshot"))
    objective.check_settings(vocabulary, [critic.limits for critic in critics])
    uniforms = _with_tail_uniforms(objective, uniforms, targets)
    objective.check_inputs(snapshot is not None, uniforms, targets.numel())
    return loss_from_hidden(
        objective,
        player,
        critics,
        targets,
        vocabulary,
        ignore_index=ignore_index,
        num_valid=num_valid,
        snapshot=earlier,
        uniforms=uniforms,
        scheduled=scheduled,
        compiled=compiled,
    )


def loss_from_hidden(
    objective: Objective,
    player: HiddenAnswers,
    critics: Sequence[Answers],
    targets: Tensor,
    vocab_size: int,
    *,
    ignore_index: int = -100,
    num_valid: Tensor | float | None = None,
    snapshot: HiddenAnswers | None = None,
    uniforms: Tensor | None = None,
    scheduled: Scheduled | None = None,
    compiled: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """:func:`linear_objective_loss` without its checks, for a loop that has made them once."""
    weights, safe_targets = position_weights(
        targets.reshape(-1).long(), ignore_index, num_valid, compute_dtype(player.states.dtype)
    )
    hidden, head_weight = player
    wants = [tensor.requires_grad and torch.is_grad_enabled() for tensor in player]
    sums = _sums_as_one_operator if torch.compiler.is_compiling() else chunked_sums
    with torch.no_grad():
        models = [model.flat(vocab_size) for model in (player, *critics, *([snapshot] if snapshot else []))]
        device_type = hidden.device.type
        if torch.is_autocast_enabled(device_type):  # once, since every chunk's product would cast again
            models = [model.cast(torch.get_autocast_dtype(device_type)) for model in models]
        metrics, grad_hidden, grad_weight = sums(
            objective, models, safe_targets, weights, uniforms, scheduled, *wants, compiled
        )
        if grad_hidden is not None:
            grad_hidden = grad_hidden.reshape(hidden.shape)
        if grad_weight is not None and vocab_size < len(head_weight):  # where the head has padding rows
            grad_weight = torch.nn.functional.pad(grad_weight, (0, 0, 0, len(head_weight) - vocab_size))
    return _with_gradients(metrics["loss"], (hidden, head_weight), (grad_hidden, grad_weight)), metrics


def chunked_sums(
    objective: Objective,
    models: Sequence[Answers],
    targets: Tensor,
    weights: Tensor,
    uniforms: Tensor | None,
    scheduled: Scheduled | None,
    wants_states: bool,
    wants_weight: bool,
    compiled: bool = False,
) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
    """Compute loss, metrics and gradients of all positions chunk by chunk, without autograd.

    Args:
        models: The player, the critics and, where the objective needs one, the snapshot; N positions each.
        targets: (N,) int64, a real id everywhere.
        weights: (N,) what each position counts.
        uniforms: (N, S) in [0, 1), or None.
        scheduled: Values of settings that change over time, or None.
        wants_states: Whether to compute the gradient over the player's states.
        wants_weight: The same of its head weight.
        compiled: Whether passes over the logits go through torch.compile.

    Returns:
        Metrics summed with ``weights`` (scalars), and the gradients of the loss over the player's states (N, d) and
        over its head weight (V, d), both in float32 or float64; None where not wanted.
    """
    player: HiddenAnswers = models[0]
    num_positions, vocabulary = player.states.shape[0], player.weight.shape[0]
    dtype = compute_dtype(player.states.dtype)
    # Contiguous whatever the inputs are: the operator of a compiled graph promises so.
    grad_states = player.states.new_empty(player.states.shape, dtype=dtype) if wants_states else None
    grad_weight = player.weight.new_zeros(player.weight.shape, dtype=dtype) if wants_weight else None

    # The products see weights of up to 1 and the gradients are scaled at the end: 1/M would underflow in float16.
    largest = weights.amax() if num_positions else weights.sum()
    relative = weights / largest.clamp(min=torch.finfo(dtype).tiny)
    ignored = weights == 0
    rows = chunk_rows(num_positions, vocabulary, player.states.device)
    readers = [model.reader(rows, ignored) for model in models]
    partial = None if grad_weight is None or player.weight.dtype == dtype else torch.empty_like(player.weight)
    totals: dict[str, Tensor] = {}
    with torch.autocast(player.states.device.type, enabled=False):
        for start in range(0, num_positions, rows) if num_positions else (0,):
            chunk = slice(start, start + rows)
            answers = [read(chunk) for read in readers]
            snapshot_logits = answers.pop().logits if objective.needs_snapshot else None
            inputs = LossInputs(
                answers[0].logits,
                answers[1:],
                targets[chunk],
                relative[chunk],
                snapshot_logits,
                None if uniforms is None else uniforms[chunk],
                scheduled,
                compiled,
            )
            gradient, metrics = objective.loss_and_gradient(inputs, wants_states or wants_weight)
            for name, value in _weighted_sums(metrics, weights[chunk]).items():
                totals[name] = totals[name] + value if name in totals else value
            if gradient is None:
                continue
            gradient = gradient.to(player.weight.dtype)  # (rows, V)
            if wants_states and gradient.dtype == dtype:
                torch.mm(gradient, player.weight, out=grad_states[chunk])
            elif wants_states:
                grad_states[chunk] = gradient @ player.weight
            if wants_weight:
                states = player.states[chunk].masked_fill(ignored[chunk].unsqueeze(1), 0.0)
                if partial is None:
                    grad_weight.addmm_(gradient.t(), states)
                else:  # summed in float32, whatever the product's dtype
                    grad_weight += torch.mm(gradient.t(), states, out=partial)
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


def is_compiled(impl: str) -> bool:
    """Whether ``impl`` means passes over the logits through torch.compile.

    Raises:
        ValueError: There is none of that name.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl is {impl!r}; expected one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    return IMPLEMENTATIONS[impl] == "compiled"


# --- what both share -------------------------------------------------------------------------------------------------


def position_weights(
    targets: Tensor, ignore_index: int, num_valid: Tensor | float | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Each position's share (N,) of the loss, 1/M or 0, all 0 when M is 0; and targets (N,) that are safe to look up.

    ``num_valid`` is M, the positions that count over a whole optimiser step; those of ``targets`` when None.
    """
    counted = targets != ignore_index
    if num_valid is None:
        total = counted.sum().to(dtype)
    elif isinstance(num_valid, Tensor):
        total = num_valid.to(dtype)
    else:  # filled there: a copy would make the host wait
        total = torch.full((), num_valid, dtype=dtype, device=targets.device)
    return torch.where(counted & ~(total <= 0), 1 / total, 0.0), targets.masked_fill(~counted, 0)


def _with_tail_uniforms(objective: Objective, uniforms: Tensor | None, targets: Tensor) -> Tensor | None:
    """The uniforms given; torch's own (N, 1) where none are and only a sampled tail needs some."""
    if uniforms is None and objective.samples_tail and objective.num_uniforms == 1:
        return torch.rand(targets.numel(), 1, device=targets.device)
    return uniforms


def _weighted_sums(metrics: dict[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
    """Σ weights · metric for each metric (N,), as scalars; what an ignored position holds does not matter."""
    counted = weights != 0
    return {name: torch.where(counted, values * weights, 0).sum() for name, values in metrics.items()}


def _with_gradients(loss: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
    """Return ``loss`` as if autograd had computed it from ``inputs``, with these gradients.

    They are constants to autograd: a second derivative (``create_graph=True``) is not supported.
    """
    pairs = [(x, gradient) for x, gradient in zip(inputs, gradients, strict=True) if gradient is not None]
    if not pairs:
        return loss
    return _KnownGradients.apply(loss, *(x for x, _ in pairs), *(gradient for _, gradient in pairs))


class _KnownGradients(torch.autograd.Function):
    """Hands autograd gradients that were written down in closed form, times the incoming one."""

    @staticmethod
    def forward(ctx, loss: Tensor, *inputs_and_gradients: Tensor) -> Tensor:
        half = len(inputs_and_gradients) // 2
        ctx.save_for_backward(*inputs_and_gradients[half:])
        ctx.dtypes = [x.dtype for x in inputs_and_gradients[:half]]
        return loss.clone()

    @staticmethod
    def backward(ctx, incoming: Tensor):
        gradients = ctx.saved_tensors
        # Multiplied in the loss's dtype, since a gradient scaler's factor may be beyond float16, and rounded once.
        if torch.is_grad_enabled():  # create_graph: over the incoming gradient alone
            scaled = ((gradient * incoming).to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True))
        else:
            scaled = (
                torch.mul(gradient, incoming, out=torch.empty_like(gradient, dtype=dtype))
                for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
            )
        return None, *scaled, *(None for _ in gradients)


# --- in a user's own compiled graph ----------------------------------------------------------------------------------

# torch.compile would unroll the loop over chunks and trace the objective once for each. As an operator the loss is one
# node of the graph around it, without a break, and runs inside as it does without a compiler.


def _sums_as_one_operator(
    objective: Objective,
    models: Sequence[HiddenAnswers | CachedAnswers],
    targets: Tensor,
    weights: Tensor,
    uniforms: Tensor | None,
    scheduled: Scheduled | None,
    wants_states: bool,
    wants_weight: bool,
    compiled: bool,
) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
    """:func:`chunked_sums`, as one node of a graph."""
    metrics, grad_states, grad_weight = torch.ops.avatarl.chunked_sums(
        objective.spec,
        [len(model) for model in models],
        [tensor for model in models for tensor in model],
        targets,
        weights,
        uniforms,
        list(scheduled or ()),
        wants_states,
        wants_weight,
        compiled,
    )
    names = _metric_names(objective, models)
    metrics = dict(zip(names, metrics.unbind(), strict=True))
    return metrics, grad_states if wants_states else None, grad_weight if wants_weight else None


def _metric_names(objective: Objective, models: Sequence[Answers]) -> tuple[str, ...]:
    critics = models[1 : len(models) - objective.needs_snapshot]
    return objective.metric_names([critic.limits for critic in critics])


def _models(lengths: Sequence[int], tensors: Sequence[Tensor]) -> list[HiddenAnswers | CachedAnswers]:
    """Answers from their tensors, so many each."""
    rest = iter(tensors)
    return [BY_NUMBER_OF_TENSORS[length](*(next(rest) for _ in range(length))) for length in lengths]


@torch.library.custom_op("avatarl::chunked_sums", mutates_args=())
def _chunked_sums_operator(
    spec: str,
    lengths: Sequence[int],
    tensors: Sequence[Tensor],
    targets: Tensor,
    weights: Tensor,
    uniforms: Tensor | None,
    scheduled: Sequence[Tensor],
    wants_states: bool,
    wants_weight: bool,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Metrics in the order of their names (M,), and both gradients; an unwanted one is empty."""
    metrics, grad_states, grad_weight = chunked_sums(
        objective_from_spec(spec),
        _models(lengths, tensors),
        targets,
        weights,
        uniforms,
        Scheduled(*scheduled) if scheduled else None,
        wants_states,
        wants_weight,
        compiled,
    )
    nothing = weights.new_empty(0)
    return (
        torch.stack(list(metrics.values())),
        nothing if grad_states is None else grad_states,
        nothing.clone() if grad_weight is None else grad_weight,
    )


@_chunked_sums_operator.register_fake
def _(spec, lengths, tensors, targets, weights, uniforms, scheduled, wants_states, wants_weight, compiled):
    objective, models = objective_from_spec(spec), _models(lengths, tensors)
    states, weight = models[0]
    dtype = compute_dtype(states.dtype)

    def gradient(like: Tensor, wanted: bool) -> Tensor:
        return like.new_empty(like.shape if wanted else 0, dtype=dtype)

    metrics = states.new_empty(len(_metric_names(objective, models)), dtype=dtype)
    return metrics, gradient(states, wants_states), gradient(weight, wants_weight)
