"""Frozen models whose weights are held in few bits, by transformers' own quantisers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.quantizers.auto import AutoQuantizationConfig

from avatarl.errors import UserError, nearest_name
from avatarl.untrusted import refusing

# The methods that run on a CPU too, where they are tested, by the package that each is in; with settings as an example.
QUANTISERS = {
    "bitsandbytes": "load_in_8bit: true",
    "torchao": "quant_type: {default: {_type: Int8WeightOnlyConfig, _version: 2, _data: {}}}",
}


def quantisation_options(
    config: PreTrainedConfig, name: str, wanted: Mapping[str, Any] | None, device: torch.device | str
) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that quantise a model, or open one that was saved quantised; often none.

    Args:
        config: The model's.
        name: Where the model came from, for messages.
        wanted: The settings to quantise by, as transformers writes them in config.json as ``quantization_config``.
        device: Where to quantise, since some layouts are made for the device that they are made on.

    Raises:
        UserError: An unknown method or setting, a package that is not installed, or a model that is quantised already.
    """
    saved = getattr(config, "quantization_config", None)
    if saved is not None and wanted is not None:
        raise UserError(f"{name} was saved quantised, and cannot be quantised again; expected no critic_quantization")
    settings, where = (wanted, "critic_quantization") if saved is None else (saved, f"{name}: quantization_config")
    if settings is None:
        return {}
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    if method not in QUANTISERS:
        raise UserError(f"{where}: quant_method is {method!r}; expected one of {', '.join(QUANTISERS)}")
    for package in (method, "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"{where}: quant_method {method!r} needs the package {package}, which is not installed; pip install "
                "'avatarl[quantised]'"
            )
    options: dict[str, Any] = {"device_map": {"": device}}
    if wanted is not None:
        before = f"{where}: {dict(wanted)} is not understood ("
        example = f"{{quant_method: {method}, {QUANTISERS[method]}}}"
        with refusing(before, f"); expected what transformers writes as quantization_config, such as {example}"):
            options["quantization_config"] = AutoQuantizationConfig.from_dict(dict(wanted))
        known = options["quantization_config"].to_dict()
        for setting in sorted(wanted.keys() - known.keys()):  # the library would ignore it
            raise UserError(f"{where}: {method} has no setting {setting!r}{nearest_name(setting, known)}")
    return options


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is anything but an ordinary tensor of floating-point numbers of at least 16 bits."""
    return type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point() or weight.itemsize == 1


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor as the ordinary ones that hold it: itself, or those inside a quantised weight (torchao)."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from plain_tensors(getattr(tensor, name))
