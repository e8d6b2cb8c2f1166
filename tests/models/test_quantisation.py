"""Quantised critics: what is refused anywhere, and, where the packages are installed, that they judge and go on."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from avatarl import UserError
from avatarl.models import PlayerConfig, build_player, forward_flops_per_token, load_critic
from avatarl.models.digest import digest_of_model
from avatarl.models.loading import head_weight
from avatarl.models.quantisation import is_quantised, plain_tensors
from avatarl.run_dir.identity import identities_of_run
from avatarl.training import TrainConfig, train

from ..conftest import BLOCK

BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_8bit": True}
TORCHAO = {
    "quant_method": "torchao",
    "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}},
}
METHODS = {"bitsandbytes": BITSANDBYTES, "torchao": TORCHAO}
# Widths that every quantiser takes.
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
SHAPE |= {"num_key_value_heads": 2, "head_dim": 32}


@pytest.fixture
def folder_of(tmp_path: Path, tokenizer) -> Callable[..., Path]:
    """``folder_of(architecture, settings)``: a critic's folder."""

    def make(architecture: str = "llama", **settings) -> Path:
        known = SHAPE if architecture == "llama" else {name: SHAPE[name] for name in list(SHAPE)[:3]}
        config = PlayerConfig(architecture=architecture, settings={**known, **settings})
        folder = tmp_path / "critic"
        build_player(config, tokenizer, BLOCK, seed=5).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def add_to_config(folder: Path, **settings) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


# --- anywhere --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("missing", ["method", "accelerate"])
def test_a_package_that_is_not_installed_is_named(critic_folder: Path, tokenizer, monkeypatch, method: str, missing):
    package = method if missing == "method" else missing
    installed = ModuleType(method)
    installed.__spec__ = ModuleSpec(method, None)
    monkeypatch.setitem(sys.modules, method, installed)
    monkeypatch.setitem(sys.modules, package, None)  # Python's own way of making an import fail
    message = f"critic_quantization: quant_method '{method}' needs the package {package}, which is not installed; pip"
    with pytest.raises(UserError, match=message):
        load_critic(critic_folder, tokenizer, quantization=METHODS[method])


@pytest.mark.parametrize("settings", [{"quant_method": "gptq", "bits": 4}, {"load_in_8bit": True}, {}])
def test_an_unknown_method_is_refused_with_those_that_are_accepted(critic_folder: Path, tokenizer, settings: dict):
    found = repr(settings.get("quant_method"))
    with pytest.raises(UserError, match=f"quant_method is {found}; expected one of bitsandbytes, torchao"):
        load_critic(critic_folder, tokenizer, quantization=settings)


@pytest.mark.parametrize("saved", [{"quant_method": "gptq", "bits": 4}, {}])
def test_a_folder_that_was_saved_by_another_method_is_refused(tmp_path: Path, critic_folder: Path, tokenizer, saved):
    shutil.copytree(critic_folder, tmp_path / "critic")
    add_to_config(tmp_path / "critic", quantization_config=saved)
    with pytest.raises(
        UserError, match="critic: quantization_config: quant_method is .*; expected one of bitsandbytes"
    ):
        load_critic(tmp_path / "critic", tokenizer)


def test_a_critic_of_random_weights_is_not_quantised(tokenizer):
    with pytest.raises(UserError, match="random:1m:7 is not read from files; expected no critic_quantization"):
        load_critic("random:1m:7", tokenizer, quantization=BITSANDBYTES)


def test_a_quantised_critic_is_not_divided():
    with pytest.raises(UserError, match="shard_critics is true, and critic_quantization is given"):
        TrainConfig(data="d", out="o", steps=1, shard_critics=True, critic_quantization=BITSANDBYTES)


class Halves(torch.Tensor):
    """A tensor that is held as two, as quantised weights are held as numbers and scales."""

    @staticmethod
    def __new__(cls, first: torch.Tensor, second: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, (len(first) + len(second),), dtype=first.dtype)

    def __init__(self, first: torch.Tensor, second: torch.Tensor):
        self.first, self.second = first, second

    def __tensor_flatten__(self):
        return ["first", "second"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        if function is torch.ops.aten.detach.default:
            return cls(arguments[0].first, arguments[0].second)
        raise NotImplementedError(function)


def test_a_tensor_that_is_held_as_several_is_read_as_those(tokenizer):
    first, second = torch.arange(3.0), torch.arange(2.0)
    assert [part.tolist() for part in plain_tensors(Halves(first, second))] == [[0, 1, 2], [0, 1]]
    assert is_quantised(Halves(first, second)) and not is_quantised(nn.Parameter(first))

    def digest(tail: torch.Tensor) -> str:
        model = build_player(PlayerConfig(settings=SHAPE), tokenizer, BLOCK, seed=5)
        model.model.norm.weight = nn.Parameter(Halves(torch.ones(60), tail), requires_grad=False)
        return digest_of_model(model)

    assert digest(torch.ones(4)) == digest(torch.ones(4)) != digest(torch.zeros(4))


# --- where the packages are installed: pip install 'avatarl[quantised]' ----------------------------------------------


@pytest.fixture(params=METHODS)
def quantization(request: pytest.FixtureRequest) -> dict:
    """Settings of each method that is installed."""
    for package in (request.param, "accelerate"):
        pytest.importorskip(package)
    return METHODS[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_critic_says_nearly_the_same(folder_of, tokenizer, quantization: dict, dtype: torch.dtype):
    folder = folder_of()
    plain = load_critic(folder, tokenizer, dtype)
    quantised = load_critic(folder, tokenizer, dtype, quantization=quantization)
    layers = [module for module in quantised.model.layers.modules() if isinstance(module, nn.Linear)]
    assert len(layers) == 14 and all(is_quantised(layer.weight) for layer in layers)
    assert head_weight(quantised).dtype == dtype and torch.equal(head_weight(quantised), head_weight(plain))
    assert not quantised.training and not any(parameter.requires_grad for parameter in quantised.parameters())
    ids = torch.arange(BLOCK).unsqueeze(0)
    said, wanted = quantised(ids).logits.float().log_softmax(-1), plain(ids).logits.float().log_softmax(-1)
    assert 0 < (said - wanted).abs().max() < 0.1
    assert forward_flops_per_token(quantised, BLOCK) == forward_flops_per_token(plain, BLOCK)


def test_two_weights_in_a_byte_are_counted_as_two(folder_of, tokenizer):
    for package in ("bitsandbytes", "accelerate"):
        pytest.importorskip(package)
    folder = folder_of()
    packed = load_critic(folder, tokenizer, quantization={"quant_method": "bitsandbytes", "load_in_4bit": True})
    plain = load_critic(folder, tokenizer)
    assert packed.model.layers[0].mlp.up_proj.weight.numel() == plain.model.layers[0].mlp.up_proj.weight.numel() // 2
    assert forward_flops_per_token(packed, BLOCK) == forward_flops_per_token(plain, BLOCK)


def test_a_critic_that_was_saved_quantised_is_the_one_that_was_quantised(
    tmp_path: Path, folder_of, tokenizer, quantization: dict
):
    folder = folder_of()
    quantised = load_critic(folder, tokenizer, quantization=quantization)
    quantised.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = load_critic(tmp_path / "saved", tokenizer)
    assert digest_of_model(saved) == digest_of_model(quantised) != digest_of_model(load_critic(folder, tokenizer))
    with pytest.raises(UserError, match="saved was saved quantised, and cannot be quantised again"):
        load_critic(tmp_path / "saved", tokenizer, quantization=quantization)


def test_a_run_under_a_quantised_critic_goes_on(tmp_path: Path, tiny_config, folder_of, tokenizer, quantization: dict):
    config = tiny_config(tmp_path, critic=str(folder_of()), critic_quantization=quantization, steps=2)
    summary = train(config, quiet=True)
    assert summary["critic_flops"] > 0
    critic = load_critic(config.critic, tokenizer, quantization=quantization)
    assert identities_of_run(tmp_path / "run")[0][f"critic {config.critic}"] == digest_of_model(critic)
    assert train(config, resume=True, quiet=True)["best_cross_entropy"] == summary["best_cross_entropy"]
    with pytest.raises(UserError, match="critic_quantization"):
        train(tiny_config(tmp_path, critic=config.critic, steps=2), resume=True, quiet=True)


def test_a_setting_that_the_method_does_not_have_is_refused(folder_of, tokenizer, quantization: dict):
    with pytest.raises(UserError, match=f"{quantization['quant_method']} has no setting 'modules_not_to_convert'"):
        load_critic(folder_of(), tokenizer, quantization=quantization | {"modules_not_to_convert": []})


def test_settings_that_the_method_does_not_understand_are_refused(folder_of, tokenizer, quantization: dict):
    wrong = {"quant_method": quantization["quant_method"], "quant_type": "int8"}
    with pytest.raises(UserError, match="is not understood .* such as {quant_method: ") as caught:
        load_critic(folder_of(), tokenizer, quantization=wrong)
    assert "\n" not in str(caught.value)


def test_a_quantised_head_is_refused_as_one(folder_of, tokenizer):
    for package in ("torchao", "accelerate"):
        pytest.importorskip(package)
    with pytest.raises(UserError, match="its head is quantised .*expected a head, and an embedding that it may share"):
        load_critic(
            folder_of(tie_word_embeddings=False),
            tokenizer,
            quantization=TORCHAO | {"include_input_output_embeddings": True},
        )


def test_a_method_that_finds_no_layer_is_refused(folder_of, tokenizer):
    for package in ("torchao", "accelerate"):
        pytest.importorskip(package)
    with pytest.raises(UserError, match="torchao quantises none of the layers of .*; expected bitsandbytes"):
        load_critic(folder_of("gpt2"), tokenizer, quantization=TORCHAO)
