"""Open models and tokenizers from run folders, model folders or Hub ids: safetensors only, no foreign code."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from torch.nn.modules import module as torch_module
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from avatarl.data.tokenizer import open_tokenizer
from avatarl.errors import UserError
from avatarl.hub import require_on_hub
from avatarl.untrusted import read_json, refusing

from .quantisation import QUANTISERS, is_quantised, plain_tensors, quantisation_options
from .resolve import resolve_model

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"


def load_model(
    model: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantization: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Open a causal language model in eval mode.

    Args:
        model: A run folder, a model folder or a Hub id. One that was saved quantised stays so.
        dtype: Of the weights, other than quantised ones.
        device: Where the weights go.
        quantization: Quantise the weights while they are read: the settings that transformers writes as
            ``quantization_config``, of a method in ``QUANTISERS``. The head is left as it is.

    Raises:
        UserError: The model cannot be found, opened or quantised like this, has no safetensors, its weights are not
            those of its configuration, it is no causal language model, or its logits are not ``hidden @ head.T``.
    """
    name = resolve_model(model)
    with refusing(f"{name} cannot be opened as a causal language model: "):
        if not os.path.isdir(name):
            require_on_hub(name, "model")
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        _check_kind(config, name)
        check_implementations(config, name)
        quantised = quantisation_options(config, name, quantization, device)
        with _no_larger_than_its_weights(Path(name), bool(quantised)):
            opened, report = AutoModelForCausalLM.from_pretrained(
                name,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                use_cache=False,
                output_loading_info=True,
                **quantised,
            )
        _copy_from_files(opened)
        _check_causal(opened, name)
        _check_weights(opened, report)
        _check_head(opened, name)
        if quantization and not any(is_quantised(weight) for weight in opened.parameters()):
            method, others = quantization["quant_method"], QUANTISERS.keys() - {quantization["quant_method"]}
            raise UserError(
                f"critic_quantization: {method} quantises none of the layers of {name}; expected {' or '.join(others)}"
            )
        return opened.to(device).eval()


def _copy_from_files(model: PreTrainedModel) -> None:
    """Copy weights that the library has left mapped to their files, which others may write into."""
    for plain in chain.from_iterable(map(plain_tensors, chain(model.parameters(), model.buffers()))):
        # bitsandbytes' own kinds know their data by other names too, and are left as they are.
        if plain.device.type == "cpu" and type(plain) in (Tensor, torch.nn.Parameter):
            plain.data = plain.data.clone()


def _check_kind(config: PreTrainedConfig, name: str) -> None:
    """Refuse a model that its configuration shows to be no causal language model."""
    kind, causal = config.model_type, config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if config.is_encoder_decoder:
        found = f"is an encoder-decoder ({kind}), which reads one text to write another"
    elif not causal and config.get_text_config() is not config:
        found = f"is multimodal ({kind}), and transformers opens no part of it as a causal language model"
    elif not causal:
        found = f"is of type {kind}, for which transformers has no causal language model"
    else:
        return
    raise UserError(f"{name} {found}; expected one that AutoModelForCausalLM opens, such as llama, gpt2 or qwen3")


def check_implementations(config: PreTrainedConfig, name: str) -> None:
    """Refuse a configuration that has the library fetch a kernel, which is code, from the Hub."""
    for part in (config, *(getattr(config, part, None) for part in config.sub_configs)):
        for kind in ("_attn_implementation", "_experts_implementation"):
            implementation = getattr(part, kind, None)
            if isinstance(implementation, str) and "/" in implementation:
                raise UserError(f"{name}: {kind[1:]} is {implementation!r}; code from the Hub is not run")


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """Open the tokenizer that lies with a model.

    Raises:
        UserError: There is none.
    """
    name = resolve_model(model)
    with refusing(f"{name} has no tokenizer that can be opened: "):
        return open_tokenizer(name)


@contextmanager
def _no_larger_than_its_weights(folder: Path, quantised: bool = False) -> Iterator[None]:
    """Stop building a model as soon as it is larger than the folder's weight files.

    The sizes in a configuration are only numbers: a short file can ask for a terabyte, and the library would make
    random weights for all that is not in the files.
    """
    if not folder.is_dir():  # a hub id, whose files are not known before the library fetches them
        yield
        return
    shapes = [shape for path in _weight_files(folder) for shape in _tensor_shapes(path)]
    # Tied weights are built twice; some architectures cut up or join what the files hold, or keep masks in buffers. A
    # quantised layer takes the place of an ordinary one, and two of its weights may share a byte.
    most_elements = (8 if quantised else 2) * sum(map(math.prod, shapes)) + (1 << 28)
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
    """The files that hold a model's tensors: one, or those that its index names, all in the folder."""
    index_path = folder / WEIGHTS_INDEX
    if (folder / WEIGHTS).is_file() or not index_path.is_file():
        return [folder / WEIGHTS]
    names = set(read_json(index_path)["weight_map"].values())
    for name in names:
        # Another suffix would be unpickled.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index_path}: names {name!r}; expected .safetensors files in the same folder")
    return [folder / name for name in sorted(names)]


def _tensor_shapes(path: Path) -> list[list[int]]:
    with safe_open(path, framework="pt") as file:
        return [file.get_slice(name).get_shape() for name in file.keys()]


def _check_weights(model: PreTrainedModel, report: dict) -> None:
    """Refuse weights that do not fit the model: the library makes missing ones at random, and drops those left over.

    Left-over buffers, such as the masks in old files, are harmless; left-over weights mean that layers are missing.
    """
    head = model.get_output_embeddings()
    of_head = {name for name, module in model.named_modules(remove_duplicate=False) if module is head}
    for name in report["missing_keys"]:
        if name.removesuffix(".weight") in of_head:
            raise UserError(
                f"{model.name_or_path}: has no head ({name} is missing), so it was saved without one and gives no "
                "logits; expected a model saved from AutoModelForCausalLM, or one whose head is its input embedding"
            )
    left_over = [name for name in report["unexpected_keys"] if name.endswith("weight")]
    mismatched = [name for name, *_ in report["mismatched_keys"]]
    for found, names in (
        ("are missing", report["missing_keys"]),
        ("have other sizes", mismatched),
        ("belong to no layer of config.json", left_over),
    ):
        if names:
            raise UserError(f"{model.name_or_path}: {len(names)} tensors {found}, such as {min(names)}")
    for name, parameter in model.named_parameters():
        for plain in plain_tensors(parameter):
            numbers = plain.float() if plain.is_floating_point() and plain.itemsize == 1 else plain
            # The smallest and the largest are found without a copy, and either is NaN where any number is.
            if numbers.numel() and not all(extreme.isfinite() for extreme in numbers.aminmax()):
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


def check_model(model: PreTrainedModel, name: str) -> None:
    """Refuse a model that reads ahead, or whose logits are not its last hidden states times its output embedding."""
    _check_causal(model, name)
    _check_head(model, name)


@torch.no_grad()
def check_window(model: PreTrainedModel, block_size: int, name: str) -> None:
    """Refuse a model that cannot read a window of ``block_size`` tokens; it is tried, as few architectures say."""
    window = (torch.arange(block_size, device=model.device) % len(model.get_input_embeddings().weight)).unsqueeze(0)
    with evaluating(model), refusing(f"{name} cannot read a window of {block_size} tokens: "):
        last_hidden(model, window)


@torch.no_grad()
def check_loss(model: PreTrainedModel, name: str) -> None:
    """Refuse a model that adds to the cross-entropy of its logits, as mixtures of experts do for their routers.

    The objectives start from hidden states, so what its own forward pass adds would be lost silently.
    """
    if longest_sequence(model) == 1:  # where its own loss has no token to predict
        return
    ids = torch.tensor([[min(1, len(head_weight(model)) - 1), 0]], device=model.device)
    with evaluating(model):
        answer = model(input_ids=ids, labels=ids, use_cache=False)
    # Decoders of encoder-decoders take labels that are shifted already.
    plain = [F.cross_entropy(answer.logits.float()[0, : len(labels)], labels) for labels in (ids[0, 1:], ids[0])]
    if any(answer.loss <= loss * (1 + torch.finfo(answer.loss.dtype).eps) for loss in plain):
        return
    settings = model.config.get_text_config().to_dict().items()
    causes = [
        f"{key}: {value}" for key, value in settings if value and ("loss" in key or key == "output_router_logits")
    ]
    raise UserError(
        f"{name}: {', '.join(causes) or model.config.model_type} adds {answer.loss - plain[0]:.3g} to its loss, which "
        "the objectives do not compute; expected output_router_logits: false, or a coefficient of 0"
    )


@torch.no_grad()
def _check_causal(model: PreTrainedModel, name: str) -> None:
    """Refuse a model that reads ahead: a masked model under a causal name would see the answer."""
    if longest_sequence(model) == 1:  # where there is no later token
        return
    rows = model.get_input_embeddings().weight.shape[0]
    first = min(1, rows - 1)  # token 0 may be padding, whose embedding is zero
    pair = torch.tensor([[first, 0], [first, rows - 1]], device=model.device)
    with evaluating(model):
        one, other = last_hidden(model, pair)[:, 0].float()
    if (one - other).abs().max() > 0.01 * one.abs().max():
        raise UserError(
            f"{name}: its hidden states depend on later tokens, as those of an encoder (BERT) do, so it would be shown "
            "the answer; expected a causal language model"
        )


@torch.no_grad()
def _check_head(model: PreTrainedModel, name: str) -> None:
    """Refuse a model whose logits are not its last hidden states times its head's weight.

    The objectives compute logits from these two, so a bias, a scale or a soft cap would be lost silently. Both ways
    are compared on a few tokens, and once more with large logits, where a cap shows.
    """
    expected = (
        "; the objectives know hidden states and the head's weight alone, so expected are logits that are their product"
    )
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if weight is None:
        raise UserError(f"{name}: has no output embedding, and so no logits; expected a causal language model")
    if is_quantised(weight):
        raise UserError(
            f"{name}: its head is quantised ({type(weight).__name__}, {weight.dtype}); the objectives multiply by it, "
            "so expected a head, and an embedding that it may share, that are left as they are"
        )
    if getattr(head, "bias", None) is not None:
        raise UserError(f"{name}: its logits have a bias{expected}")
    # Sequences of one token, since a model may be made for no longer ones.
    ids = torch.arange(min(4, len(weight)), device=model.device).unsqueeze(1)
    both = []
    with evaluating(model):
        for factor in (1.0, 1024.0):  # powers of two, so that scaling back restores every bit
            weight.mul_(factor)
            logits = model(input_ids=ids, use_cache=False).logits.float()
            both.append((logits, (last_hidden(model, ids) @ weight.t()).float()))
            weight.mul_(1 / factor)
    if all(_close(logits, products) for logits, products in both):
        return
    raise UserError(f"{name}: its logits are {_difference(*both)}{expected}")


def _close(logits: Tensor, products: Tensor) -> bool:
    """Whether two ways to the logits agree to a twentieth of the largest."""
    return logits.shape == products.shape and bool((logits - products).abs().max() <= 0.05 * logits.abs().max())


def _difference(small: tuple[Tensor, Tensor], large: tuple[Tensor, Tensor]) -> str:
    """How logits differ from the products, given (logits, products) under an ordinary head and under a large one."""
    if small[0].shape != small[1].shape:
        return f"of the shape {tuple(small[0].shape)} where the product has {tuple(small[1].shape)}"
    growth = [logits.abs().max() / products.abs().max() for logits, products in (small, large)]
    if growth[1] < growth[0] / 2:
        return f"capped at {large[0].abs().max():.3g}"
    factor = (small[0] * small[1]).sum() / small[1].square().sum()
    if _close(small[0], factor * small[1]):
        return f"scaled by {factor:.3g}"
    return "made by more than the head"


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put the model in eval mode, and afterwards back in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def last_hidden(model: PreTrainedModel, input_ids: torch.Tensor, **others: Any) -> torch.Tensor:
    """Hidden states (B, T, d) after the last layer and its normalisation, for token ids (B, T) and other inputs."""
    return model.base_model(input_ids=input_ids, use_cache=False, **others).last_hidden_state


def head_weight(model: PreTrainedModel) -> torch.Tensor:
    """The output embedding (V, d)."""
    return model.get_output_embeddings().weight


def longest_sequence(model: PreTrainedModel) -> int | None:
    """The most tokens the model was made to read at once; None where it does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def one_line(error: Exception) -> str:
    """What a library's error says, on one line."""
    return textwrap.shorten(str(error), 240, placeholder=" …") or type(error).__name__
