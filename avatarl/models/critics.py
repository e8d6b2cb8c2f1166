"""Critics: any causal language model that reads the same tokens as the player, frozen."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from avatarl.errors import UserError

from .loading import head_weight, load_model, load_tokenizer
from .players import PRESETS, PlayerConfig, random_player

EMA_CRITIC = re.compile(r"ema:(0|0?\.\d+):(\d+)")
RANDOM_CRITIC = re.compile(r"random:([^:]*):(\d+)")
RANDOM_CRITIC_CONTEXT = 1 << 17  # positions are rotations, so this costs nothing


def load_critic(
    critic: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantization: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Open a critic: a run folder, a model folder or a hub id; frozen, in eval mode.

    ``random:PRESET:SEED`` is one of random weights. It knows nothing, as a control, and needs no file.
    ``quantization`` quantises the weights, as :func:`~avatarl.models.load_model` does.

    Raises:
        UserError: Its vocabulary is not ``tokenizer``'s, or it cannot be opened, or not be quantised.
    """
    if str(critic) == "ema":
        parse_ema_critic(str(critic))
    if str(critic).startswith("ema:"):
        raise UserError(f"critic {critic} is the average of a player that is being trained; expected a model")
    if str(critic).startswith("random:"):
        if quantization is not None:
            raise UserError(f"critic {critic} is not read from files; expected no critic_quantization")
        return _random_critic(str(critic), tokenizer).to(device=device, dtype=dtype)
    check_same_vocabulary(tokenizer, load_tokenizer(critic), str(critic))
    model = load_model(critic, dtype, device, quantization).requires_grad_(False)
    if head_weight(model).shape[0] < len(tokenizer):
        raise UserError(f"critic {critic} has {head_weight(model).shape[0]} output rows for {len(tokenizer)} tokens")
    return model


def parse_ema_critic(name: str) -> tuple[float, int]:
    """Decay and start step of ``ema:DECAY:START_STEP``.

    Raises:
        UserError: It is not written so, or the decay is not in [0, 1).
    """
    match = EMA_CRITIC.fullmatch(name)
    if match is None:
        raise UserError(f"critic is {name!r}; expected ema:DECAY:START_STEP, as ema:0.999:500, with a decay below 1")
    return float(match[1]), int(match[2])


def _random_critic(name: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    match = RANDOM_CRITIC.fullmatch(name)
    if match is None or match[1] not in PRESETS:
        raise UserError(
            f"critic is {name!r}; expected random:PRESET:SEED, as random:1m:7, with a preset of {', '.join(PRESETS)}"
        )
    preset, seed = match[1], int(match[2])
    model = random_player(PlayerConfig(preset=preset), tokenizer, RANDOM_CRITIC_CONTEXT, seed)
    return model.eval().requires_grad_(False)


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
