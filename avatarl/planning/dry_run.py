"""One optimiser step on tensors without contents: what it would hold in memory, without computing anything.

The step is the trainer's own: the real player, critics, objective and optimisers, on PyTorch's fake tensors, which have
a shape, a dtype and a storage of so many bytes and no data. Counting the storages that are alive after every operation
gives the peak of any architecture and objective, down to what the backward pass needs for an instant.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig, PreTrainedModel

from avatarl.models import ParameterCount, count_parameters, forward_flops_per_token
from avatarl.models.critic_cache import RecordFormat
from avatarl.models.players import check_size, explaining, model_from_config
from avatarl.objective import StoredCritic, kernels, make_objective
from avatarl.objective.fused import chunked
from avatarl.training.config import TrainConfig
from avatarl.training.optim import Optimisers, build_optimisers, clip_gradients
from avatarl.training.processes import Processes
from avatarl.training.rewarded_player import FrozenModel, RewardedPlayer
from avatarl.untrusted import refusing

PLAYERS_ACTIVATIONS, CRITICS_ACTIVATIONS = "player's activations", "critics' activations"
# The parts of memory, in the order of a plan.
PARTS = (
    "weights",
    "gradients",
    "optimiser state",
    "critics",
    "snapshot",
    PLAYERS_ACTIVATIONS,
    CRITICS_ACTIVATIONS,
    "loss",
    "temporaries",
)


@dataclass(frozen=True)
class DryRun:
    """What one process's optimiser step holds, bytes, and what the models cost.

    Args:
        peaks: For each phase of the step (``forward``, ``loss``, ``backward``, ``optimiser``) the parts of memory at
            the instant of it when most was held.
        weights: All of the player's weights; a finished model folder is as large.
        optimiser_state: What the optimisers keep between steps.
        snapshot: The earlier player of ``ppo``; 0 for others.
        critics: The critics' weights.
        gathered: The largest part of the player's weights that is whole at once under FSDP2.
        gathered_critics: The same of each critic, added up.
        parameters: The player's parameters.
        player_flops: Per token, forward and backward.
        critic_flops: Per token, one forward pass of each critic in turn.
        snapshot_flops: Per token, one forward pass of the snapshot.
    """

    peaks: dict[str, dict[str, int]]
    weights: int
    optimiser_state: int
    snapshot: int
    critics: int
    gathered: int
    gathered_critics: int
    parameters: ParameterCount
    player_flops: int
    critic_flops: tuple[int, ...]
    snapshot_flops: int


def dry_run(
    config: TrainConfig,
    player_config: PreTrainedConfig,
    critic_configs: Sequence[PreTrainedConfig | RecordFormat],
    averaged: Sequence[bool],
    vocab_size: int,
    windows: int,
    micro_batches: int,
    precision: str,
    device_type: str,
) -> DryRun:
    """Go through an optimiser step of ``micro_batches`` forward passes over ``windows`` windows each.

    It is that of eager PyTorch with attention that holds no T × T scores; ``compile`` and kernels that fuse hold less.

    Args:
        config: The run; its sizes of batches are not looked at.
        player_config, critic_configs: The models' shapes, and what is stored of cached critics.
        averaged: Which critics are the player's averages.
        vocab_size: Tokens of the vocabulary.
        precision: ``bf16`` or ``fp32``.
        device_type: ``cpu`` or ``cuda``: whose chunks of logits are held.

    Raises:
        UserError: The player is too small for the vocabulary or ``block_size``, a model cannot be built or run with its
            sizes, or what it does depends on its data in a way that cannot be known without computing.
    """
    live = LiveBytes()
    # There is no fake CUDA device without a real one, so the tensors lie on a CPU and autocast follows its rules; on a
    # GPU it keeps a few more results in float32, such as the powers in GPT-2's activation.
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()
    with FakeTensorMode(), live, _chunks_of(device_type), _silenced("torch._subclasses.fake_tensor"):
        live.part = "weights"
        with explaining(config.player):
            player = model_from_config(player_config)
            check_size(player, vocab_size, config.block_size)
        live.part = "critics"
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        asked = []
        for name, shape, is_average in zip(config.critics, critic_configs, averaged, strict=False):  # or none is asked
            with refusing(f"critic {name} cannot be built: "):
                is_cached = isinstance(shape, RecordFormat)
                of_dtype = torch.float32 if is_average else dtype
                asked.append(None if is_cached else FrozenModel(model_from_config(shape, of_dtype)))
        critics = [critic for critic in asked if critic]
        player_name = f"player.architecture {config.player.architecture!r}"
        player_settings = f" (player.settings {config.player.settings})"
        with _planning(player_name, player_settings):
            player_flops = forward_flops_per_token(player, config.block_size)
        critic_flops = []
        for name, critic in zip(config.critics, asked, strict=False):
            with _planning(f"critic {name}"):
                critic_flops.append(forward_flops_per_token(critic.model, config.block_size) if critic else 0)
        objective = make_objective(config.objective, config.avatarl, config.baseline)
        live.part = "snapshot"
        snapshot = FrozenModel(model_from_config(player_config)) if objective.needs_snapshot else None
        model = RewardedPlayer(player, objective, asked, vocab_size, "chunked", snapshot)
        _follow_parts(live, player, [*critics, *([snapshot] if snapshot else [])])

        live.part = "batches"
        tokens = torch.zeros(windows, config.block_size, dtype=torch.int64)
        draws = torch.zeros(tokens.numel(), objective.num_draws) if objective.num_draws else None
        formats = [shape for shape in critic_configs if isinstance(shape, RecordFormat)]
        stored = [empty_record(form, tokens) for form in formats]
        optimisers = build_optimisers(player, config.optim, total_steps=2)
        refused = torch.zeros((), dtype=torch.bool)
        live.part = "gradients"
        for parameter in player.parameters():
            parameter.grad = torch.zeros_like(parameter)
        live.part = "optimiser state"
        optimisers.step(1, refused)  # makes the state, which the step below finds as every later one does
        live.forget_peaks()

        player.train()
        with _planning(player_name, player_settings):
            # The second one finds gradients; a third would find nothing new.
            for _ in range(min(2, micro_batches)):
                with autocast:
                    loss, metrics = model(tokens, tokens, tokens.numel(), draws, stored)
                live.phase = live.part = "backward"
                loss.backward()
                del loss, metrics
        live.phase = live.part = "optimiser"
        clip_gradients(player.parameters(), config.optim.clip_norm, Processes())
        optimisers.step(2, refused)

    weights = weight_bytes(player)
    state = state_bytes(optimisers)
    return DryRun(
        peaks={phase: _by_part(held, weights) for phase, held in live.peaks.items()},
        weights=weights,
        optimiser_state=state,
        snapshot=weights if snapshot else 0,
        critics=sum(weight_bytes(critic) for critic in critics),
        gathered=gathered_bytes(player),
        gathered_critics=sum(gathered_bytes(critic.model) for critic in critics),
        parameters=count_parameters(player),
        player_flops=3 * player_flops,  # backward costs twice as much
        critic_flops=tuple(critic_flops),
        snapshot_flops=player_flops if snapshot else 0,
    )


def empty_record(record: RecordFormat, tokens: torch.Tensor) -> StoredCritic:
    """What is read of a cache for windows of ``tokens`` (B, T)."""

    def of(count: int | None, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(*tokens.shape, *([] if count is None else [count]), dtype=dtype)

    return StoredCritic(
        of(1 + record.num_top, torch.int64),
        of(1 + record.num_top, torch.float32),
        of(None, torch.float32),
        of(record.num_draws, torch.int64),
        of(None, torch.float32),
        torch.zeros(record.vocab_size),
    )


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations under it have made and that are still in use.

    Attributes:
        part: Storages made from now on belong to this part of memory.
        phase: The phase of the step that is going on.
        peaks: For each phase, bytes by part at the instant when most were held.
    """

    def __init__(self):
        super().__init__()
        self.part = self.phase = ""
        self.peaks: dict[str, Counter[str]] = {}
        self._held: Counter[str] = Counter()
        self._known: set[int] = set()
        self._most: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._see(value.untyped_storage())
        return result

    def forget_peaks(self) -> None:
        """Start anew; what is alive stays known."""
        self.peaks.clear()
        self._most.clear()

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self._held[self.part] += size
        weakref.finalize(storage, self._forget, key, size, self.part).atexit = False
        total = self._held.total()
        if total > self._most[self.phase]:
            self._most[self.phase] = total
            self.peaks[self.phase] = self._held.copy()

    def _forget(self, key: int, size: int, part: str) -> None:
        self._known.discard(key)
        self._held[part] -= size


def _follow_parts(live: LiveBytes, player: PreTrainedModel, judges: Sequence[FrozenModel]) -> None:
    """Let ``live`` know whose forward pass is going on; what comes between and after them is the loss."""

    def enter(part: str):
        def hook(*_):
            live.phase, live.part = "forward", part

        return hook

    def leave(*_):
        live.phase = live.part = "loss"

    # The player is asked for hidden states, not for logits: its own forward pass is not called.
    for module, part in [(player.base_model, PLAYERS_ACTIVATIONS), *((judge, CRITICS_ACTIVATIONS) for judge in judges)]:
        module.register_forward_pre_hook(enter(part))
        module.register_forward_hook(leave)


def _by_part(held: Counter[str], gradient_bytes: int) -> dict[str, int]:
    """Bytes by part in the plan's words: of what the backward pass made, gradients stay and the rest passes."""
    made = held["backward"]
    gradients = min(made, gradient_bytes)
    known = {**held, "gradients": held["gradients"] + gradients}
    known["temporaries"] = made - gradients + held["optimiser"] + held["batches"]
    return {part: known.get(part, 0) for part in PARTS}


@contextmanager
def _chunks_of(device_type: str) -> Iterator[None]:
    """Within it the loss cuts its logits as on that kind of device, though fake tensors lie on a CPU."""
    rows, elements, cached = chunked.CHUNK_ROWS["cpu"], chunked.CHUNK_ELEMENTS["cpu"], kernels.CACHED_ELEMENTS
    try:
        if device_type == "cuda":
            chunked.CHUNK_ROWS["cpu"], chunked.CHUNK_ELEMENTS["cpu"] = (
                chunked.CHUNK_ROWS["cuda"],
                chunked.CHUNK_ELEMENTS["cuda"],
            )
            kernels.CACHED_ELEMENTS = 2**62  # a GPU's kernels read all rows of a chunk at once
        yield
    finally:
        chunked.CHUNK_ROWS["cpu"], chunked.CHUNK_ELEMENTS["cpu"], kernels.CACHED_ELEMENTS = rows, elements, cached


def _planning(name: str, after: str = "") -> AbstractContextManager[None]:
    """Within it, what a model does that cannot be followed without contents becomes a :class:`UserError`."""
    return refusing(f"{name} cannot be planned without computing: ", after)


@contextmanager
def _silenced(logger: str) -> Iterator[None]:
    """Within it that logger says nothing: what it would tell in thirty lines becomes one line of ours."""
    logging.getLogger(logger).disabled = True
    try:
        yield
    finally:
        logging.getLogger(logger).disabled = False


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, each once."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def state_bytes(optimisers: Optimisers) -> int:
    """Bytes of what the optimisers keep between steps."""
    states = [state for optimiser in optimisers.optimisers for state in optimiser.state.values()]
    return sum(value.nbytes for state in states for value in state.values() if isinstance(value, torch.Tensor))


def gathered_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that FSDP2 holds whole at once: those of the root, of a layer, and of the next one."""
    blocks = set(model._no_split_modules or ())
    layers = [weight_bytes(module) for module in model.modules() if type(module).__name__ in blocks]
    root = weight_bytes(model) - sum(layers)
    return root + sum(sorted(layers)[-2:])
