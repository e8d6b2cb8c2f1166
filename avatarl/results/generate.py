"""Text from a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from avatarl.errors import UserError
from avatarl.objective.config import require_number, require_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .players import Player

LONGEST_PROMPT = 1 << 20  # characters, of which a tokenizer takes some hundred bytes each


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
        samples: How many continuations.
        max_new_tokens: The most tokens of a continuation; the model's context, prompt included, may hold fewer.
        temperature: Logits are divided by this; 0 always takes the most likely token.
        top_k: Draw from this many most likely tokens only.
        top_p: Draw from the shortest list of tokens that reaches this probability.
        seed: The same seed gives the same texts.
        device: cpu, cuda or auto.

    Returns:
        The prompt with each continuation, up to the end of the document.

    Raises:
        UserError: A value is out of range, the prompt fills the context, or the model cannot be opened.
    """
    from .players import open_player

    sampling = Sampling(samples, max_new_tokens, temperature, top_k, top_p, seed)
    player = open_player(model, device)
    read = prompt_ids(player.tokenizer, prompt)
    before, *texts = (
        player.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in (read, *continue_ids(player, read, sampling))
    )
    # The prompt as it was given, whatever the tokenizer makes of it.
    return [prompt + text[len(before) :] if text.startswith(before) else text for text in texts]


@dataclass(frozen=True)
class Sampling:
    """How a prompt is continued, as :func:`generate` describes it."""

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


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """What a model reads to continue a prompt: its tokens, or the end of the document before.

    Raises:
        UserError: Neither is there, or it is longer than any model reads.
    """
    from avatarl.data.tokenizer import encode_texts, end_of_text_id

    if len(prompt) > LONGEST_PROMPT:
        raise UserError(f"prompt has {len(prompt):,} characters; expected at most {LONGEST_PROMPT:,}")
    (ids,) = encode_texts(tokenizer, [prompt])
    end_id = end_of_text_id(tokenizer)
    if not ids and end_id is None:
        raise UserError("prompt is empty and the model's tokenizer has no end-of-text token; expected some text")
    return ids or [end_id]


def continue_ids(player: Player, ids: Sequence[int], sampling: Sampling) -> list[list[int]]:
    """The prompt ``ids`` with each continuation, up to the end of the document; shorter ones are filled up with it.

    Args:
        player: An opened model; what its folder says of generation is ignored from now on.
        ids: What to continue, at least one token.
        sampling: How.

    Raises:
        UserError: The prompt fills the context.
    """
    import torch
    from transformers import GenerationConfig

    from avatarl.data.tokenizer import end_of_text_id

    model, tokenizer = player.model, player.tokenizer
    # Beams, penalties and forced tokens that the folder's generation_config.json may ask for are not applied.
    model.generation_config = GenerationConfig()
    room = player.context_length - len(ids)
    if room < 1:
        raise UserError(f"prompt has {len(ids)} tokens; expected fewer than the model's context of {len(ids) + room}")
    inputs = torch.tensor([list(ids)] * sampling.samples, device=model.device)
    settings = {"do_sample": False}
    if sampling.temperature > 0:
        settings = {
            "do_sample": True,
            "temperature": float(sampling.temperature),
            "top_k": sampling.top_k or 0,
            "top_p": sampling.top_p or 1.0,
        }
    end_id = end_of_text_id(tokenizer)
    # A padded head has rows that no token belongs to, which must never be drawn.
    without_token = range(len(tokenizer), model.config.get_text_config().vocab_size)
    with torch.random.fork_rng():
        torch.manual_seed(sampling.seed)
        out = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=min(sampling.max_new_tokens, room),
            eos_token_id=end_id,
            pad_token_id=end_id,
            suppress_tokens=list(without_token) or None,
            use_cache=True,
            **settings,
        )
    return out.tolist()
