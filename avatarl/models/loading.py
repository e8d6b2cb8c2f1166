"""Opening models and tokenizers from run folders, model folders or hub ids: safetensors only, no code from outside."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch.nn.modules import module as torch_module
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from avatarl.data.tokenizer import open_tokenizer
from avatarl.errors import UserError
from avatarl.outside import LARGEST_CONFIG_BYTES, check_library_folder, parse_json, read_regular_file, refusing

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"


def resolve_model(model: str | Path) -> str:
    """The folder or hub id that ``model`` means: a run folder stands for its best player.

    Raises:
        UserError: A folder that is neither a run nor a model, or a model folder without safetensors.
    """
    folder = Path(model)
    if not os.path.exists(folder):  # unlike `Path.exists`, it takes any name
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
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} holds an adapter (adapter_config.json); expected a model with it merged in")
    check_library_folder(folder)
    return str(folder)


def load_model(
    model: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Open a causal language model in eval mode.

    Raises:
        UserError: It cannot be found or opened, has no safetensors, its weights are not those that its configuration
            asks for, or its logits are not ``hidden @ head.T``.
    """
    name = resolve_model(model)
    with refusing(f"{name} cannot be opened as a causal language model: "):
        with _no_larger_than_its_weights(Path(name)):
            opened, report = AutoModelForCausalLM.from_pretrained(
                name,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                use_cache=False,
                output_loading_info=True,
            )
        _check_weights(opened, report)
        check_model(opened, name)
    return opened.to(device).eval()


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """Open the tokenizer that lies with a model.

    Raises:
        UserError: There is none.
    """
    name = resolve_model(model)
    with refusing(f"{name} has no tokenizer that can be opened: "):
        return open_tokenizer(name)


@contextmanager
def _no_larger_than_its_weights(folder: Path) -> Iterator[None]:
    """Stop the building of a model as soon as it is larger than the folder's weight files.

    The sizes in a configuration are only numbers: a short file can ask for a terabyte, and the library would make
    random weights for all that is not in the files.
    """
    if not folder.is_dir():  # a hub id, whose files are not known before the library fetches them
        yield
        return
    shapes = [shape for path in _weight_files(folder) for shape in _tensor_shapes(path)]
    # Tied weights are built twice; some architectures cut up or join what the files hold, or keep masks in buffers.
    most_elements = 2 * sum(map(math.prod, shapes)) + (1 << 28)
    most_tensors = 16 * len(shapes) + 64
    built_elements = built_tensors = 0

    def count(_module, _name, tensor) -> None:
        nonlocal built_elements, built_tensors
        if tensor is not None and tensor.is_meta:  # once loaded, a tensor takes its place anew
            built_elements += tensor.numel()
            built_tensors += 1
        if built_elements > most_elements or built_tensors > most_tensors:
            raise UserError(f"{folder}: config.json asks for a larger model than the weight files hold")

    hooks = [
        torch_module.register_module_parameter_registration_hook(count),
        torch_module.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's tensors: one, or those that its index names, all of them in the folder."""
    index_path = folder / WEIGHTS_INDEX
    if (folder / WEIGHTS).is_file() or not index_path.is_file():
        return [folder / WEIGHTS]
    names = set(parse_json(read_regular_file(index_path, LARGEST_CONFIG_BYTES))["weight_map"].values())
    for name in names:
        # Another suffix would be unpickled.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index_path}: names {name!r}; expected .safetensors files in the same folder")
    return [folder / name for name in sorted(names)]


def _tensor_shapes(path: Path) -> list[list[int]]:
    with safe_open(path, framework="pt") as file:
        return [file.get_slice(name).get_shape() for name in file.keys()]


def _check_weights(model: PreTrainedModel, report: dict) -> None:
    """Refuse weights that are not the model's: what is missing would be random, what is left over is lost.

    Left-over buffers, such as the masks in old files, are harmless; weights tell that layers are missing.
    """
    left_over = [name for name in report["unexpected_keys"] if name.endswith("weight")]
    for found, names in {
        "are missing": report["missing_keys"],
        "have other sizes": [name for name, *_ in report["mismatched_keys"]],
        "belong to no layer of config.json": left_over,
    }.items():
        if names:
            raise UserError(f"{model.name_or_path}: {len(names)} tensors {found}, such as {min(names)}")
    for name, parameter in model.named_parameters():
        # The smallest and the largest are found without a copy, and either is NaN where any number is.
        if parameter.numel() and not all(extreme.isfinite() for extreme in parameter.aminmax()):
            raise UserError(f"{model.name_or_path}: {name} holds numbers that are not finite")
    longest = longest_sequence(model)
    if longest is not None and (type(longest) is not int or longest < 1):
        raise UserError(f"{model.name_or_path}: max_position_embeddings is {longest!r}; a whole number is expected")


def check_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a model that cannot read or write every token of ``tokenizer``."""
    for what, embedding in ("input", model.get_input_embeddings()), ("output", model.get_output_embeddings()):
        rows = embedding.weight.shape[0]
        if rows < len(tokenizer):
            raise UserError(f"{name} has {rows} {what} rows for {len(tokenizer)} tokens")


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
