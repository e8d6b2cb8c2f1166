"""Opening models and tokenizers from run folders, model folders or hub ids: safetensors only, no code from outside."""

from __future__ import annotations

import textwrap
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from avatarl.errors import UserError


def resolve_model(model: str | Path) -> str:
    """The folder or hub id that ``model`` means: a run folder stands for its best player.

    Raises:
        UserError: A folder that is neither a run nor a model, or a model folder without safetensors.
    """
    folder = Path(model)
    if not folder.exists():
        # A hub id is NAME or OWNER/NAME; where OWNER is a folder here, a mistyped path is the likelier meaning.
        if len(folder.parts) > 2 or len(folder.parts) == 2 and Path(folder.parts[0]).exists():
            raise UserError(f"{model}: no such folder; expected a run folder, a model folder or a hub id")
        return str(model)
    if not (folder / "config.json").exists() and (folder / "player" / "config.json").exists():
        folder = folder / "player"
    if not (folder / "config.json").is_file():
        raise UserError(f"{model} is neither a run folder (with player/) nor a model folder (with config.json)")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} has no .safetensors file; expected a model saved with save_pretrained")
    return str(folder)


def load_model(
    model: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Open a causal language model in eval mode.

    Raises:
        UserError: It cannot be found or opened, has no safetensors, or its logits are not ``hidden @ head.T``.
    """
    name = resolve_model(model)
    try:
        opened = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, use_safetensors=True, trust_remote_code=False, use_cache=False
        )
    except Exception as error:  # whatever the libraries below make of a file that is not what it should be
        raise UserError(f"{name} cannot be opened as a causal language model: {one_line(error)}") from error
    check_model(opened, name)
    return opened.to(device).eval()


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """Open the tokenizer that lies with a model.

    Raises:
        UserError: There is none.
    """
    name = resolve_model(model)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{name} has no tokenizer that can be opened: {one_line(error)}") from error


@torch.no_grad()
def check_model(model: PreTrainedModel, name: str) -> None:
    """Refuse a model that looks ahead, or whose logits are not its last hidden states times its output embedding.

    The objectives start from hidden states and the head's weight, so a bias, a scale or a soft cap on the logits would
    be silently lost. Both ways are compared on a few tokens, and once more with large logits, where a cap shows.

    Raises:
        UserError: The two differ, or an earlier hidden state depends on a later token.
    """
    reason = f"{name}: its logits are not hidden states times head weight (a bias, scale or cap on the logits)"
    head = model.get_output_embeddings()
    if getattr(head, "weight", None) is None or getattr(head, "bias", None) is not None:
        raise UserError(reason)
    was_training = model.training
    model.eval()
    # Sequences of one token, since a model may be made for no longer ones.
    ids = torch.arange(min(4, head_weight(model).shape[0]), device=model.device).unsqueeze(1)
    for scale in (1.0, 1024.0):  # powers of two, so that scaling back restores every bit
        head_weight(model).mul_(scale)
        expected = model(input_ids=ids, use_cache=False).logits.float()
        found = (last_hidden(model, ids) @ head_weight(model).t()).float()
        head_weight(model).mul_(1 / scale)
        tolerance = 0.05 * expected.abs().max()
        if found.shape != expected.shape or (found - expected).abs().max() > tolerance:
            raise UserError(reason)
    if longest_sequence(model) != 1:
        # One that reads ahead (a masked model under a causal name) would be shown the answer.
        pair = torch.tensor([[0, 0], [0, head_weight(model).shape[0] - 1]], device=model.device)
        first = last_hidden(model, pair)[:, 0].float()
        if (first[0] - first[1]).abs().max() > 0.05 * first.abs().max():
            raise UserError(f"{name}: its hidden states depend on later tokens; expected a causal language model")
    model.train(was_training)


def last_hidden(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Hidden states (B, T, d) after the last layer and its normalisation, for token ids (B, T)."""
    return model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state


def head_weight(model: PreTrainedModel) -> torch.Tensor:
    """The output embedding (V, d)."""
    return model.get_output_embeddings().weight


def longest_sequence(model: PreTrainedModel) -> int | None:
    """The most tokens the model was made to read at once; None where it does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def one_line(error: Exception) -> str:
    """What a library's error says, on one line."""
    return textwrap.shorten(str(error), 240, placeholder=" …") or type(error).__name__
