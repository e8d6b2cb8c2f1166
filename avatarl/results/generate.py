"""Text from a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from avatarl.data.tokenizer import encode_texts, end_of_text_id
from avatarl.device import pick_device
from avatarl.errors import UserError
from avatarl.models import load_model, load_tokenizer
from avatarl.models.loading import check_rows
from avatarl.objective.config import require_number, require_whole

from .evaluate import context_length

LONGEST_PROMPT = 1 << 20  # characters, of which a tokenizer takes some hundred bytes each


@dataclass(frozen=True)
class Sampling:
    """How a prompt is continued.

    Args:
        samples: How many continuations.
        max_new_tokens: At most so many tokens each, and no more than the model's context holds with the prompt.
        temperature: Logits are divided by this; 0 always takes the most likely token.
        top_k: Draw from the so many most likely tokens only.
        top_p: Draw from the shortest list of tokens that reaches this probability.
        seed: The same seed gives the same texts.
    """

    samples: int = 1
    max_new_tokens: int = 100
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 1

    def __post_init__(self):
        require_whole("samples", self.samples, minimum=1)
        require_whole("max_new_tokens", self.max_new_tokens, minimum=1)
        require_whole("seed", self.seed, minimum=0)
        if self.seed >= 1 << 63:
            raise UserError(f"seed is {self.seed}; expected a whole number below 2^63")
        require_number("temperature", self.temperature, lambda x: x >= 0, "a number of at least 0")
        if self.top_k is not None:
            require_whole("top_k", self.top_k, minimum=1)
        if self.top_p is not None:
            require_number("top_p", self.top_p, lambda x: 0 < x <= 1, "a number in (0, 1]")


def generate(
    model: str | Path,
    prompt: str = "",
    *,
    samples: int = 1,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 1,
    device: str = "auto",
) -> list[str]:
    """Continue a prompt.

    Args:
        model: A run folder (its best player), a model folder or a hub id.
        prompt: The text to continue; empty for the beginning of a document.
        samples, max_new_tokens, temperature, top_k, top_p, seed: As :class:`Sampling` has them.
        device: ``cpu``, ``cuda`` or ``auto``.

    Returns:
        The prompt with each continuation, up to the end of the document.

    Raises:
        UserError: A value is out of range, the prompt fills the context, or the model cannot be opened.
    """
    sampling = Sampling(samples, max_new_tokens, temperature, top_k, top_p, seed)
    tokenizer = load_tokenizer(model)
    player = load_model(model, torch.float32, pick_device(device))
    check_rows(player, tokenizer, str(model))
    read = prompt_ids(tokenizer, prompt)
    before, *texts = (
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in (read, *continue_ids(player, tokenizer, read, sampling))
    )
    # The prompt as it was given, whatever the tokenizer makes of it.
    return [prompt + text[len(before) :] if text.startswith(before) else text for text in texts]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """What a model reads to continue a prompt: its tokens, or the end of the document before.

    Raises:
        UserError: Neither is there, or it is longer than any model reads.
    """
    if len(prompt) > LONGEST_PROMPT:
        raise UserError(f"prompt has {len(prompt):,} characters; at most {LONGEST_PROMPT:,} are expected")
    (ids,) = encode_texts(tokenizer, [prompt])
    end_id = end_of_text_id(tokenizer)
    if not ids and end_id is None:
        raise UserError("prompt is empty and the model's tokenizer has no end-of-text token; expected some text")
    return ids or [end_id]


def continue_ids(
    player: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], sampling: Sampling
) -> list[list[int]]:
    """The prompt ``ids`` with each continuation, up to the end of the document; shorter ones are filled up with it.

    Args:
        player: An opened model; what its folder says of generation is ignored from now on.
        tokenizer: The model's.
        ids: What to continue, at least one token.
        sampling: How.

    Raises:
        UserError: The prompt fills the context.
    """
    # Beams, penalties and forced tokens that the folder's generation_config.json may ask for are none of ours.
    player.generation_config = GenerationConfig()
    room = context_length(player) - len(ids)
    if room < 1:
        raise UserError(f"prompt has {len(ids)} tokens; expected fewer than the model's context of {len(ids) + room}")
    inputs = torch.tensor([list(ids)] * sampling.samples, device=player.device)
    draws = {"do_sample": False}
    if sampling.temperature > 0:
        draws = {
            "do_sample": True,
            "temperature": float(sampling.temperature),
            "top_k": sampling.top_k or 0,
            "top_p": sampling.top_p or 1.0,
        }
    end_id = end_of_text_id(tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(sampling.seed)
        out = player.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=min(sampling.max_new_tokens, room),
            eos_token_id=end_id,
            pad_token_id=end_id,
            suppress_tokens=_ids_without_token(player.config.get_text_config().vocab_size, len(tokenizer)),
            use_cache=True,
            **draws,
        )
    return out.tolist()


def _ids_without_token(rows: int, tokens: int) -> list[int] | None:
    """Rows of a padded head that no token belongs to, which must never be drawn."""
    return list(range(tokens, rows)) or None
