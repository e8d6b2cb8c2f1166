"""Players: causal language models of the transformers library with random weights, from presets or by architecture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from avatarl.errors import UserError, nearest_name

from .config import PRESETS, PlayerConfig
from .loading import (
    check_implementations,
    check_loss,
    check_model,
    check_window,
    head_weight,
    longest_sequence,
    one_line,
)


def build_player(
    config: PlayerConfig, tokenizer: PreTrainedTokenizerBase, block_size: int, seed: int
) -> PreTrainedModel:
    """Build a player in float32; ``config``, the vocabulary, ``block_size`` and ``seed`` alone decide its weights.

    Args:
        config: Size and architecture.
        tokenizer: The data's.
        block_size: The longest sequence that it must read, in tokens.
        seed: Of the random weights.

    Raises:
        UserError: The architecture does not know a setting, cannot be built with it or cannot read ``block_size``
            tokens then, adds to its own loss, or its logits are not ``hidden @ head.T``.
    """
    name = f"player.architecture {config.architecture!r}"
    with _explaining(config):
        player = random_player(config, tokenizer, block_size, seed)
        check_model(player, name)
        check_size(player, len(tokenizer), block_size)
        check_loss(player, f"{name}: player.settings")
        check_window(player, block_size, f"{name} with player.settings {config.settings}")
    return player


def random_player(
    config: PlayerConfig, tokenizer: PreTrainedTokenizerBase, block_size: int, seed: int
) -> PreTrainedModel:
    """The model that :func:`build_player` builds, unchecked."""
    with torch.random.fork_rng(devices=[]):
        model_config = _model_config(config, tokenizer, block_size)
        torch.default_generator.manual_seed(seed)  # the CPU's alone: that of a GPU is not ours to reset
        return model_from_config(model_config)


def player_shape(config: PlayerConfig, vocab_size: int, block_size: int) -> PreTrainedConfig:
    """The architecture's configuration that :func:`build_player` takes for a vocabulary of ``vocab_size`` tokens.

    Raises:
        UserError: The architecture does not know a setting or refuses its value.
    """
    with _explaining(config):
        return _model_config(config, _Vocabulary(vocab_size), block_size)


def model_from_config(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of that shape with random weights."""
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


class _Vocabulary:
    """A tokenizer of which only the size is known, for a model's configuration."""

    bos_token_id = eos_token_id = pad_token_id = 0

    def __init__(self, size: int):
        self._size = size

    def __len__(self) -> int:
        return self._size


@contextmanager
def _explaining(config: PlayerConfig) -> Iterator[None]:
    """Turn whatever an architecture raises for settings that it cannot use into a :class:`UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each architecture checks its configuration in its own way
        raise UserError(
            f"player.architecture {config.architecture!r} cannot be built with player.settings {config.settings}: "
            f"{one_line(error)}"
        ) from error


def check_size(player: PreTrainedModel, vocabulary: int, block_size: int) -> None:
    """Refuse settings that leave tokens without an embedding or positions without a place."""
    rows = head_weight(player).shape[0]
    if rows < vocabulary:
        raise UserError(f"player.settings: vocab_size is {rows}; expected at least the tokenizer's {vocabulary}")
    longest = longest_sequence(player)
    if longest is not None and longest < block_size:
        raise UserError(
            f"player.settings: max_position_embeddings is {longest}; expected at least block_size, {block_size}"
        )


def _model_config(config: PlayerConfig, tokenizer: PreTrainedTokenizerBase, block_size: int):
    """The preset's shape under the architecture's own names."""
    if config.architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"player.architecture is {config.architecture!r}; expected a causal language model of transformers, such "
            f"as llama, gpt2 or qwen3{nearest_name(config.architecture, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}"
        )
    shape = PRESETS[config.preset]
    template = AutoConfig.for_model(config.architecture)
    if template.is_encoder_decoder or template.get_text_config() is not template:
        raise UserError(
            f"player.architecture is {config.architecture!r}, an encoder-decoder or multimodal, whose text decoder "
            "would not get the preset's sizes; expected a decoder of text alone, such as llama, gpt2 or qwen3"
        )
    wanted = {
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "max_position_embeddings": block_size,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
        "use_cache": False,
    }
    for name in config.settings:
        if not hasattr(template, name):
            known = [key for key in template.to_dict() if not key.startswith("_")]
            raise UserError(
                f"player.settings names {name!r}, which {config.architecture} does not have{nearest_name(name, known)}"
            )
    # An architecture may have its own word for a setting (GPT-2's n_embd); both at once would hide the user's.
    own_words = {own: common for common, own in template.attribute_map.items()}
    wanted |= {own_words.get(name, name): value for name, value in config.settings.items()}
    # Not every architecture has these; one without a gated layer keeps its own feed-forward width.
    optional = {
        "intermediate_size": shape.intermediate_size,
        "num_key_value_heads": wanted["num_attention_heads"],
        "head_dim": wanted["hidden_size"] // wanted["num_attention_heads"],
        # Dropout is off unless asked for, in every architecture alike.
        **dict.fromkeys(("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    }
    model_config = AutoConfig.for_model(
        config.architecture, **{name: value for name, value in optional.items() if hasattr(template, name)} | wanted
    )
    check_implementations(model_config, "player.settings")
    return model_config
