"""Critics: causal language models that read the same tokens as the player, frozen. Distillation calls them teachers.

A :class:`Critic` answers for a batch. There are four kinds, a class each: a live model, a cache of one, the moving
average of the player, and one of random weights. :func:`critic_class` tells a name's kind, and nothing else asks it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from avatarl.data import PreparedData
from avatarl.device import local, send
from avatarl.errors import UserError
from avatarl.objective import Answers, CachedAnswers, HiddenAnswers
from avatarl.untrusted import refusing

from .config import PRESETS, PlayerConfig
from .counting import forward_flops_per_token
from .critic_cache.read import SPLITS, CriticCache, is_cache, read_manifest
from .digest import digest_of_model
from .loading import (
    check_model,
    check_rows,
    check_window,
    head_weight,
    last_hidden,
    load_model,
    load_tokenizer,
    longest_sequence,
    resolve_model,
)
from .players import random_player

EMA_CRITIC = re.compile(r"ema:(0|0?\.\d+):(\d+)")
RANDOM_CRITIC = re.compile(r"random:([^:]*):(\d+)")
RANDOM_CRITIC_CONTEXT = 1 << 17  # positions are rotations, so this costs nothing


class CriticInputs(NamedTuple):
    """What a critic needs to know of a batch; a training batch has the same fields."""

    inputs: Tensor  # (B, T) int64, on the device
    split: str | None = None  # that the windows are of, and their numbers in it; None for text of no prepared data
    indices: Sequence[int] | None = None
    others: Mapping[str, Any] = MappingProxyType({})  # what models read beside the tokens, such as attention_mask


class Critic:
    """What a player learns from besides the text. Subclasses are the kinds of critics."""

    kind: ClassVar[str]
    answers_any_text = False  # also text that is not of the run's data
    is_trained_elsewhere = False  # and that has a place and a cost of its own
    start_step = 0  # the last step without its answers
    keeps_state = False  # whether checkpoints hold its weights
    flops_per_token = 0  # of a forward pass inside the run
    limits: tuple[int, int] | None = None  # numbers of most likely and of drawn tokens, where it knows no others
    longest: int | None = None  # the most tokens that it was made to read at once; None where that is not known
    costs: Mapping[str, int] = {}  # FLOPs that were spent on it elsewhere, by its digest
    digest: str  # SHA-256 of all that its answers follow from, as far as it is known when a run starts

    def __init__(self, name: str):
        self.name = name

    @classmethod
    def open(cls, name: str, tokenizer: PreTrainedTokenizerBase, **how: Any) -> Critic:
        """Open the critic of this name; ``how`` are the arguments of :func:`open_critic`."""
        raise NotImplementedError

    @classmethod
    def check_name(cls, name: str) -> None:
        """Raise a UserError where nothing can be opened by this name, as far as that is known without opening."""

    @classmethod
    def digest_of(cls, name: str, dtype: torch.dtype) -> str:
        """The ``digest`` of the critic of this name, which is trained elsewhere."""
        raise NotImplementedError

    def answers(self, batch: CriticInputs) -> Answers:
        """What it says of every position of the batch."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise RunFailed where its files are no longer those that were opened."""

    def start(self, player: PreTrainedModel, step: int) -> None:
        """Take the player's weights where that is due by ``step`` and has not happened."""

    def update(self, player: PreTrainedModel, step: int) -> None:
        """Include the player as it is after ``step``, which is 0 before the first one."""

    def compile(self) -> None:
        """Compile its forward pass."""

    def shard(self, divide: Callable[[nn.Module, PreTrainedModel], None], shard_critics: bool) -> None:
        """Divide its weights among the processes, where the run divides those of such critics."""

    def release(self) -> None:
        """Free its memory; it is not asked again."""


class FrozenModel(nn.Module):
    """A model that is read and never trained: a critic, or an earlier player. Its weights may be divided (FSDP2)."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, input_ids: Tensor, **others: Any) -> HiddenAnswers:
        """Hidden states of windows (B, T), and the head."""
        return HiddenAnswers(last_hidden(self.model, input_ids, **others), head_weight(self.model))


class LiveCritic(Critic):
    """A model that runs beside the player: a run folder, a model folder or a hub id."""

    kind, answers_any_text, is_trained_elsewhere = "model", True, True
    has_started = False  # whether it has taken weights of the player; only these belong into a checkpoint

    def __init__(self, name: str, model: PreTrainedModel, block_size: int | None = None):
        """
        Args:
            name: As the recipe has it.
            model: The model; it is frozen.
            block_size: The windows that it will read; None where that is not known and its FLOPs are not counted.

        Raises:
            UserError: It cannot read such windows.
        """
        super().__init__(name)
        self.module: FrozenModel | None = FrozenModel(model)
        self.longest = longest_sequence(model)
        if block_size is not None:
            if self.longest is not None and self.longest < block_size:
                raise UserError(
                    f"critic {name} reads at most {self.longest} tokens; expected at least block_size, {block_size}"
                )
            check_window(model, block_size, f"critic {name}")
            self.flops_per_token = forward_flops_per_token(model, block_size)

    @classmethod
    def open(cls, name, tokenizer, *, dtype, device, quantization, block_size, **_) -> LiveCritic:
        check_same_vocabulary(tokenizer, load_tokenizer(name), name)
        model = load_model(name, dtype, device, quantization)
        if head_weight(model).shape[0] < len(tokenizer):
            raise UserError(f"critic {name} has {head_weight(model).shape[0]} output rows for {len(tokenizer)} tokens")
        return cls(name, model, block_size)

    @classmethod
    def check_name(cls, name: str) -> None:
        resolve_model(name)

    @classmethod
    def digest_of(cls, name: str, dtype: torch.dtype) -> str:
        return digest_of_model(load_model(name, dtype))

    @property
    def model(self) -> PreTrainedModel:
        return self.module.model

    def answers(self, batch: CriticInputs) -> HiddenAnswers:
        return self.module(batch.inputs, **batch.others)

    @property
    def digest(self) -> str:
        return digest_of_model(self.model)

    def compile(self) -> None:
        self.module.compile()

    def shard(self, divide: Callable[[nn.Module, PreTrainedModel], None], shard_critics: bool) -> None:
        if shard_critics:
            divide(self.module, self.model)

    def release(self) -> None:
        self.module, self.has_started = None, False


class RandomCritic(LiveCritic):
    """``random:PRESET:SEED``, a model of random weights. It knows nothing, as a control, and needs no file."""

    kind, is_trained_elsewhere = "random", False

    @classmethod
    def open(cls, name, tokenizer, *, dtype, device, quantization, block_size, **_) -> RandomCritic:
        if quantization is not None:
            raise UserError(f"critic {name} is not read from files; expected no critic_quantization")
        preset, seed = parse_random_critic(name)
        model = random_player(PlayerConfig(preset=preset), tokenizer, RANDOM_CRITIC_CONTEXT, seed)
        critic = cls(name, model.to(device=device, dtype=dtype), block_size)
        critic.longest = None  # its positions are rotations
        return critic

    @classmethod
    def check_name(cls, name: str) -> None:
        parse_random_critic(name)


class AverageCritic(LiveCritic):
    """``ema:DECAY:START_STEP``, the player's own moving average: after each step θ̄ ← decay · θ̄ + (1 − decay) · θ.

    It begins as a copy of the player after ``start_step``, and answers from the step after that.
    """

    kind, answers_any_text, is_trained_elsewhere = "average", False, False
    keeps_state = True

    @classmethod
    def open(cls, name, tokenizer, *, build_player, device, block_size, **_) -> AverageCritic:
        parse_ema_critic(name)
        if build_player is None:
            raise UserError(
                f"critic {name} is the average of a player that is being trained; expected a model, or "
                f"`avatarl train --critic {name}`"
            )
        return cls(name, build_player().to(device), block_size)

    @classmethod
    def check_name(cls, name: str) -> None:
        parse_ema_critic(name)

    def __init__(self, name: str, model: PreTrainedModel, block_size: int | None = None):
        """``model`` is one like the player, whose weights are replaced."""
        decay, self.start_step = parse_ema_critic(name)
        self._average = get_ema_multi_avg_fn(decay)
        super().__init__(name, model, block_size)

    def start(self, player: PreTrainedModel, step: int) -> None:
        if not self.has_started:
            self.update(player, step)

    @torch.no_grad()
    def update(self, player: PreTrainedModel, step: int) -> None:
        if step < self.start_step or self.module is None:
            return
        _reshard(self.module)
        averages = [local(weight) for weight in self.model.parameters()]  # tied ones once
        weights = [local(weight) for weight in player.parameters()]
        if self.has_started:
            self._average(averages, weights, None)
        else:
            torch._foreach_copy_(averages, weights)
        self.has_started = True

    def shard(self, divide: Callable[[nn.Module, PreTrainedModel], None], shard_critics: bool) -> None:
        divide(self.module, self.model)  # as the player is, since weights are copied part by part


class Snapshot(LiveCritic):
    """An earlier player, which ``ppo`` draws its actions from; no critic of a recipe."""

    keeps_state = True
    shard = AverageCritic.shard

    def start(self, player: PreTrainedModel, step: int) -> None:
        if not self.has_started:
            self.refresh(player)

    @torch.no_grad()
    def refresh(self, player: PreTrainedModel) -> None:
        """Become the player as it is now."""
        _reshard(self.module)
        current = player.state_dict()
        for name, tensor in self.model.state_dict().items():
            tensor.copy_(current[name])
        self.has_started = True


class CachedCritic(Critic):
    """A critic whose answers were stored before (``avatarl critic cache``); it is not in memory."""

    kind, is_trained_elsewhere = "cache", True

    def __init__(self, name: str, cache: CriticCache):
        super().__init__(name)
        self.cache, self.digest = cache, cache.digest
        self.limits = cache.record.num_top, cache.record.num_draws

    @classmethod
    def open(cls, name, tokenizer, *, data, block_size, train_windows, splits, after_main, **_) -> CachedCritic:
        if data is None or block_size is None:
            raise UserError(
                f"critic {name} is a cache; expected a model, or CriticCache.open({name!r}, data, block_size) with "
                "windows of its data"
            )
        return cls(
            name,
            after_main(
                lambda verified: CriticCache.open(name, data, block_size, train_windows, splits, verified=verified)
            ),
        )

    @classmethod
    def digest_of(cls, name: str, dtype: torch.dtype) -> str:
        return hashlib.sha256(read_manifest(Path(name))[0]).hexdigest()

    @property
    def costs(self) -> dict[str, int]:
        return {self.digest: self.cache.flops}

    def answers(self, batch: CriticInputs) -> CachedAnswers:
        """
        Raises:
            UserError: The batch is of no windows that the cache knows.
            RunFailed: A file can no longer be read, or somebody has changed it.
        """
        if batch.indices is None:
            raise UserError(
                f"critic {self.name} is a cache; the batch does not say which windows it has, as PreparedWindows does"
            )
        try:
            rows = self.cache.rows(batch.split, batch.indices)
        except IndexError as error:
            raise UserError(f"critic {self.name} does not cover {error}; expected windows of its data") from error
        return rows.map(partial(send, device=batch.inputs.device))

    def check(self) -> None:
        self.cache.check()


def _reshard(module: nn.Module) -> None:
    """Forget weights that were gathered from all processes, before they change."""
    if isinstance(module, FSDPModule):
        module.reshard()


def critic_class(name: str | Path) -> type[Critic]:
    """The class of the critic that a name stands for."""
    if is_cache(name):
        return CachedCritic
    return {"ema": AverageCritic, "random": RandomCritic}.get(str(name).partition(":")[0], LiveCritic)


def open_critic(
    critic: str | Path | PreTrainedModel | CriticCache,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int | None = None,
    data: PreparedData | None = None,
    train_windows: int | None = None,
    splits: Collection[str] = SPLITS,
    build_player: Callable[[], PreTrainedModel] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantization: Mapping[str, Any] | None = None,
    after_main: Callable[[Callable[[str | None], CriticCache]], CriticCache] = lambda open_: open_(None),
) -> Critic:
    """Open a critic: a run folder, model folder or hub id, a cache, ``ema:…`` or ``random:…``; or one that is loaded.

    Args:
        critic: Its name, a model, or a cache.
        tokenizer: The data's.
        block_size: Tokens in the windows that it will read (None: of any length; a cache then is refused).
        data: What the windows are of (None: any text; a cache then is refused).
        train_windows, splits: Those of the data that a cache has to cover; see :meth:`CriticCache.open`.
        build_player: Makes a model like the player (None: no player is trained; an average then is refused).
        dtype, device: Where and in what the weights are held.
        quantization: Quantises the weights, as :func:`~avatarl.models.load_model` does.
        after_main: Calls its argument in the main process first, then in the others with the digest of what it opened.

    Raises:
        UserError: Its vocabulary is not ``tokenizer``'s, it cannot be opened, quantised or read windows of that length.
    """
    if isinstance(critic, CriticCache):
        return CachedCritic(str(critic.path), critic)
    if isinstance(critic, str | Path):
        how = dict(data=data, block_size=block_size, train_windows=train_windows, splits=splits, after_main=after_main)
        how |= dict(build_player=build_player, dtype=dtype, device=device, quantization=quantization)
        return critic_class(critic).open(str(critic), tokenizer, **how)
    name = getattr(critic, "name_or_path", "") or type(critic).__name__
    if not isinstance(critic, PreTrainedModel):
        raise UserError(f"critic is a {name}; expected a causal language model of transformers")
    with refusing(f"critic {name} cannot be run on tokens: "):
        check_rows(critic, tokenizer, f"critic {name}")
        check_model(critic, f"critic {name}")
    return LiveCritic(name, critic.to(device), block_size)


def load_critic(
    critic: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantization: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Load the model of a critic, frozen and in eval mode; see :func:`open_critic`.

    Raises:
        UserError: It has none, its vocabulary is not ``tokenizer``'s, or it cannot be opened or quantised.
    """
    return open_critic(critic, tokenizer, dtype=dtype, device=device, quantization=quantization).model


def parse_ema_critic(name: str) -> tuple[float, int]:
    """Decay and start step of ``ema:DECAY:START_STEP``.

    Raises:
        UserError: It is not written so, or the decay is not in [0, 1).
    """
    match = EMA_CRITIC.fullmatch(name)
    if match is None:
        raise UserError(f"critic is {name!r}; expected ema:DECAY:START_STEP, as ema:0.999:500, with a decay below 1")
    return float(match[1]), int(match[2])


def parse_random_critic(name: str) -> tuple[str, int]:
    """Preset and seed of ``random:PRESET:SEED``.

    Raises:
        UserError: It is not written so, or there is no such preset.
    """
    match = RANDOM_CRITIC.fullmatch(name)
    if match is None or match[1] not in PRESETS:
        raise UserError(
            f"critic is {name!r}; expected random:PRESET:SEED, as random:1m:7, with a preset of {', '.join(PRESETS)}"
        )
    return match[1], int(match[2])


def check_same_vocabulary(
    tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, name: str, role: str = "critic"
) -> None:
    """Refuse a critic or model whose token ids do not mean what the data's mean.

    Args:
        tokenizer: The data's.
        other: The model's.
        name: Where the model came from, for the message.
        role: What the model is, for the message.

    Raises:
        UserError: with both sizes and the first token that differs.
    """
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    if ours == theirs:
        return
    by_id = {token_id: token for token, token_id in ours.items()}
    by_id_theirs = {token_id: token for token, token_id in theirs.items()}
    first = min(i for i in by_id.keys() | by_id_theirs.keys() if by_id.get(i) != by_id_theirs.get(i))
    raise UserError(
        f"{role} {name} has another vocabulary ({len(theirs)} tokens) than the data ({len(ours)} tokens): "
        f"id {first} is {_token(by_id_theirs, first)} there and {_token(by_id, first)} here; "
        f"expected a {role} trained with the data's tokenizer"
    )


def _token(by_id: dict[int, str], token_id: int) -> str:
    return repr(by_id[token_id]) if token_id in by_id else "no token"
