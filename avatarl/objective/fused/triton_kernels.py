"""The kernels by hand, in Triton: every reading of the logits is one pass, and so is all that follows from top-K.

They have run under Triton's interpreter only so far (TRITON_INTERPRET=1, set before Triton is imported), and were
compiled for a GPU without being run on one. No block size was ever timed.

Shapes: N positions, V vocabulary, K proposals per model, C critics, A = 1 + K + C·K columns, without the player's K
where it proposes none. One program has one row, or one tile of one. Computing is in float32. A row's logits must lie
side by side; rows may be any distance apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import DEFAULT_TAIL, AvataRLConfig
from ..kernels import LOWEST_LOG_PROB, Kernels
from ..rewards import DenseTail, Judgement
from ..schedule import Scheduled
from ..stored import StoredCritic
from ..top_k import blocks_to_search, top_k, top_k_in_blocks

STATISTICS_TILE = 2048  # logits that one step of the softmax's statistics reads; it keeps three numbers for each
GRADIENT_TILE = 4096  # logits that one program turns into gradients
ELEMENTS_PER_WARP = 256  # 16 bytes of half precision per thread

LOWEST = tl.constexpr(LOWEST_LOG_PROB)
NAN = tl.constexpr(tl.PropagateNan.ALL)


class TritonKernels(Kernels):
    """What :class:`Kernels` computes, in Triton; float64 logits, and ``top_p`` below 1, are left to the plain ones."""

    def check_device(self, device_type: str) -> None:
        """Raise a ValueError for a device that Triton has no code for."""
        if device_type != "cuda" and isinstance(_read_rows, triton.JITFunction):
            raise ValueError("impl='triton' needs a CUDA device, or TRITON_INTERPRET=1")

    def statistics(self, logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """What :meth:`Kernels.statistics` gives, (N,) float32 each, of logits (N, V) in half or single precision."""
        self.check_device(logits.device.type)
        if logits.dtype == torch.float64:
            return super().statistics(logits, temperature)
        return read_rows(logits, STATISTICS_TILE, temperature)[:3]

    def judge(
        self,
        player: Tensor,
        critics: Sequence[Tensor | StoredCritic],
        targets: Tensor,
        config: AvataRLConfig,
        uniforms: Tensor | None = None,
        scheduled: Scheduled | None = None,
    ) -> Judgement:
        """Actions int64, valid bool and rewards float32, (N, A) each, as :func:`avatarl.objective.rewards.judge`.

        Each model's logits are read once, and at the active actions. What is said above of ``top_p`` holds for cached
        critics, settings that change over time and tails other than the pool's own.
        """
        self.check_device(player.device.type)
        cuts = config.top_p is not None and config.top_p < 1
        is_plain = cuts or scheduled is not None or config.tail_rule != DEFAULT_TAIL[config.pool]
        is_plain |= any(isinstance(critic, StoredCritic) for critic in critics)
        if is_plain or torch.float64 in (logits.dtype for logits in (player, *critics)):
            return super().judge(player, critics, targets, config, uniforms, scheduled)
        lists = [targets.unsqueeze(1)]
        if config.player_proposes:
            lists.append(proposals(player, config.top_k, False)[0])
        experts = []
        for logits, weight in zip(critics, config.critic_weights(len(critics)), strict=True):
            normalised = weight > 0 and config.needs_critic_normaliser
            tokens, normaliser = proposals(logits, config.top_k, normalised)
            lists.append(tokens)
            if weight > 0:  # never 0 · −∞
                experts.append((logits, normaliser, weight))
        actions = torch.cat(lists, dim=1)
        return Judgement(actions, *pay(actions, experts, config))

    def gradient_(
        self,
        logits: Tensor,
        temperature: float,
        largest: Tensor,
        constant: Tensor,
        bonus: Tensor | None,
        tails: Sequence[DenseTail] = (),
    ) -> Tensor:
        """See :meth:`Kernels.gradient_`; in the logits' dtype."""
        self.check_device(logits.device.type)
        if tails or logits.dtype == torch.float64:
            return super().gradient_(logits, temperature, largest, constant, bonus, tails)
        num_positions, vocabulary = logits.shape
        tile = min(GRADIENT_TILE, triton.next_power_of_2(vocabulary))
        with torch.cuda.device_of(logits):
            _write_gradient[(num_positions, triton.cdiv(vocabulary, tile))](
                logits,
                row_stride(logits),
                vocabulary,
                temperature,
                largest.contiguous(),
                constant.contiguous(),
                None if bonus is None else bonus.contiguous(),
                TILE=tile,
                num_warps=num_warps(tile),
            )
        return logits


Normaliser = tuple[Tensor, Tensor]  # the largest logit and the log of what is left of the softmax's sum, (N,) each


def proposals(logits: Tensor, k: int, normalised: bool) -> tuple[Tensor, Normaliser | None]:
    """The ``k`` largest logits' token ids (N, k) in falling order, and the normaliser where asked for."""
    num_blocks = blocks_to_search(logits.shape[1], k)
    if num_blocks is None:
        normaliser = read_rows(logits, STATISTICS_TILE)[:2] if normalised else None
        return top_k(logits, k)[1], normaliser
    *normaliser, _, maxima = read_rows(logits, num_blocks, statistics=normalised, maxima=True)
    return top_k_in_blocks(logits, maxima, k)[1], tuple(normaliser) if normalised else None


def read_rows(
    logits: Tensor, tile: int, temperature: float = 1.0, statistics: bool = True, maxima: bool = False
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The three of :meth:`Kernels.statistics`, and the maxima (N, tile) of blocks; None for what is not wanted."""
    num_positions, vocabulary = logits.shape
    found = [logits.new_empty(num_positions, dtype=torch.float32) if statistics else None for _ in range(3)]
    largest_of_blocks = logits.new_empty(num_positions, tile) if maxima else None
    with torch.cuda.device_of(logits):
        _read_rows[(num_positions,)](
            logits,
            row_stride(logits),
            vocabulary,
            temperature,
            *found,
            largest_of_blocks,
            TILE=tile,
            num_warps=num_warps(tile),
        )
    return *found, largest_of_blocks


def pay(
    actions: Tensor, experts: Sequence[tuple[Tensor, Normaliser | None, float]], config: AvataRLConfig
) -> tuple[Tensor, Tensor]:
    """Valid bool and rewards float32 of actions (N, A), from critics' logits, normalisers and weights above 0."""
    num_positions, width = actions.shape
    logits, normalisers, weights = zip(*experts, strict=True) if experts else ((), (), ())
    valid = torch.empty_like(actions, dtype=torch.bool)
    rewards = torch.empty_like(actions, dtype=torch.float32)
    with torch.cuda.device_of(actions):
        _pay[(num_positions,)](
            actions,
            valid,
            rewards,
            logits,
            tuple(row_stride(critic) for critic in logits),
            normalisers if config.needs_critic_normaliser else None,
            weights,
            config.reality_weight or None,
            math.log1p(-config.smoothing),
            config.smoothing,
            config.reward_scale,
            math.inf if config.reward_cap is None else config.reward_cap,
            NUM_CRITICS=len(experts),
            POOL=config.pool,
            THRESHOLD=config.threshold,
            WIDTH=width,
            BLOCK=triton.next_power_of_2(width),
            num_warps=1,
        )
    return valid, rewards


def row_stride(logits: Tensor) -> int:
    """How far apart the rows of logits (N, V) are."""
    assert logits.shape[1] == 1 or logits.stride(1) == 1, logits.stride()
    return logits.stride(0)


def num_warps(tile: int) -> int:
    """Warps of one program; a power of two, as ``tile`` is."""
    return max(1, min(8, tile // ELEMENTS_PER_WARP))


@triton.jit
def _read_rows(logits, row_stride, vocabulary, temperature, peak, log_total, entropy, maxima, TILE: tl.constexpr):
    """Lane b sees the tokens b, b + TILE, b + 2·TILE, … and keeps their maximum and two sums, over z / temperature:

    total = Σ exp(z − maximum), moment = Σ exp(z − maximum) · (z − maximum).
    """
    row, lanes = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    logits += row * row_stride
    largest = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.full((TILE,), 0.0, tl.float32)
    moment = tl.full((TILE,), 0.0, tl.float32)
    whole = vocabulary // TILE * TILE
    scale = 1 / temperature
    for start in range(0, whole, TILE):
        z = tl.load(logits + start + lanes).to(tl.float32)
        if peak is not None:
            total, moment = _add_to_softmax(z, largest, total, moment, scale)
        largest = tl.maximum(largest, z, propagate_nan=NAN)
    if maxima is not None:  # of whole layers of blocks
        tl.store(maxima + row * TILE + lanes, largest.to(maxima.dtype.element_ty))
    if peak is not None:
        z = tl.load(logits + whole + lanes, mask=whole + lanes < vocabulary, other=float("-inf")).to(tl.float32)
        total, moment = _add_to_softmax(z, largest, total, moment, scale)
        largest = tl.maximum(largest, z, propagate_nan=NAN)
        highest = tl.max(largest, axis=0)
        shift = tl.maximum((largest - highest) * scale, LOWEST, propagate_nan=NAN)
        moment = tl.sum((moment + shift * total) * tl.exp(shift), axis=0)
        total = tl.sum(total * tl.exp(shift), axis=0)
        tl.store(peak + row, highest)
        tl.store(log_total + row, tl.log(total))
        tl.store(entropy + row, tl.log(total) - moment / total)


@triton.jit
def _add_to_softmax(z, largest, total, moment, scale):
    """Total and moment with one more logit in each lane, relative to the larger of ``z`` and ``largest``.

    The one exponential rescales the sums where ``z`` is larger, and is the new weight elsewhere. Two times −∞ counts
    as equal: such a lane's sums mean nothing until a finite logit multiplies them by exp(LOWEST) = 0.
    """
    shift = tl.where(z == largest, 0.0, -tl.abs(z - largest) * scale)
    shift = tl.maximum(shift, LOWEST, propagate_nan=NAN)
    weight = tl.exp(shift)
    rises = z > largest
    moment = tl.where(rises, (moment + shift * total) * weight, moment + shift * weight)
    total = tl.where(rises, total * weight + 1, total + weight)
    return total, moment


@triton.jit
def _write_gradient(logits, row_stride, vocabulary, temperature, largest, constant, bonus, TILE: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    logits += row * row_stride
    inside = columns < vocabulary
    z = tl.load(logits + columns, mask=inside, other=float("-inf")).to(tl.float32)
    shifted = (z - tl.load(largest + row)) * (1 / temperature)
    shifted = tl.maximum(shifted, LOWEST, propagate_nan=NAN)
    factor = tl.load(constant + row)
    if bonus is not None:
        factor += tl.load(bonus + row) * shifted
    tl.store(logits + columns, (tl.exp(shifted) * factor).to(logits.dtype.element_ty), mask=inside)


@triton.jit
def _pay(
    actions,
    valid,
    rewards,
    critics,
    row_strides,
    normalisers,
    weights,
    reality_weight,
    log_target,
    smoothing,
    reward_scale,
    reward_cap,
    NUM_CRITICS: tl.constexpr,
    POOL: tl.constexpr,
    THRESHOLD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """:mod:`avatarl.objective.rewards`, line by line, on the columns of one row."""
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    is_target = columns == 0
    tokens = tl.load(actions + row * WIDTH + columns, mask=columns < WIDTH, other=-1)
    active = columns < WIDTH
    for earlier in range(WIDTH):
        repeats = (columns > earlier) & (tokens == tl.load(actions + row * WIDTH + earlier))
        active = active & (repeats == 0)
    num_active = tl.sum(active.to(tl.float32), axis=0)

    blend = tl.full((BLOCK,), 0.0, tl.float32)
    if reality_weight is not None:
        log_others = tl.log(smoothing / tl.maximum(num_active - 1, 1.0))
        # Alone, the target should have 1 and not 1 − ε; but then its consensus is 1 in any case.
        blend = _blend(blend, reality_weight, tl.where(is_target, log_target, log_others), POOL)
    for i in tl.static_range(NUM_CRITICS):
        log_probs = tl.load(critics[i] + row * row_strides[i] + tokens, mask=active, other=float("-inf"))
        log_probs = log_probs.to(tl.float32)
        if normalisers is not None:
            log_probs = log_probs - tl.load(normalisers[i][0] + row) - tl.load(normalisers[i][1] + row)
        else:
            log_probs -= tl.max(log_probs, axis=0)
        blend = _blend(blend, weights[i], log_probs, POOL)

    if POOL == "geometric":
        blend = tl.where(active, blend, float("-inf"))
        vetoed = tl.sum((blend != float("-inf")).to(tl.int32), axis=0) == 0
        blend = tl.where(is_target & vetoed, 0.0, blend)
        highest = tl.max(blend, axis=0)
        log_mass = highest + tl.log(tl.sum(tl.exp(blend - highest), axis=0))
        consensus = tl.exp(blend - log_mass)
    else:
        others = tl.where(active & (columns > 0), blend, 0.0)
        target = tl.maximum(1 - tl.sum(others, axis=0), 0.0, propagate_nan=NAN)
        consensus = tl.where(is_target, target, others)

    kept = active
    if THRESHOLD != "none":
        bar = (tl.exp(log_mass) if THRESHOLD == "mass" else 1.0) / num_active
        kept = tl.where(num_active == 1, active, active & ((consensus <= bar) == 0))  # a NaN stays
    paid = tl.where(kept, reward_scale * consensus, 0.0)
    largest = tl.max(paid, axis=0)
    paid = tl.where(largest > reward_cap, paid * (reward_cap / largest), paid)
    tl.store(valid + row * WIDTH + columns, active, mask=columns < WIDTH)
    tl.store(rewards + row * WIDTH + columns, paid, mask=columns < WIDTH)


@triton.jit
def _blend(blend, weight, log_probs, POOL: tl.constexpr):
    """The blend (a sum of logs, or of probabilities) with one more expert."""
    if POOL == "geometric":
        blend += weight * log_probs
    else:
        blend += weight * tl.exp(log_probs)
    return blend
