"""Folders that a library would open without a word, though they are not what they say: each refused by its reason."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from avatarl import UserError
from avatarl.data import PreparedData
from avatarl.data.tokenizer import resolve_tokenizer
from avatarl.models import load_model, load_tokenizer
from avatarl.outside import check_recipe
from avatarl.results import generate

from .damages import sign_again
from .mutations import PICKLE

NORM = "model.norm.weight"


def with_tensors(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """The model's tensors, changed and written back."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def with_settings(name: str, **settings) -> Callable[[Path], None]:
    """A JSON file of the folder with other settings."""

    def damage(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return damage


def with_index(name: str) -> Callable[[Path], None]:
    """An index in place of the weights, which names one file."""

    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        (folder / "pytorch_model.bin").write_bytes(PICKLE)
        index = {"metadata": {}, "weight_map": {NORM: name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (with_tensors(lambda tensors: tensors.pop(NORM)), f"1 tensors are missing, such as {NORM}"),
        (
            with_tensors(lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight": torch.ones(2, 2)})),
            "1 tensors belong to no layer of config.json",
        ),
        (with_tensors(lambda tensors: tensors[NORM].fill_(torch.nan)), f"{NORM} holds numbers that are not finite"),
        (with_tensors(lambda tensors: tensors.update({NORM: torch.ones(3)})), "cannot be opened"),
        (with_settings("config.json", hidden_size=10**9), "larger model than the weight files hold"),
        (with_settings("config.json", vocab_size=10**9), "larger model than the weight files hold"),
        (with_settings("config.json", num_hidden_layers=10**5), "larger model than the weight files hold"),
        (with_settings("config.json", num_hidden_layers=10**9), "num_hidden_layers is 1000000000; at most"),
        (with_settings("config.json", attn_implementation="owner/kernel"), "code from the Hub is not run"),
        (with_settings("config.json", transformers_weights="pytorch_model.bin"), "transformers_weights is"),
        (with_index("pytorch_model.bin"), "names 'pytorch_model.bin'; expected .safetensors files in the same folder"),
        (with_index("../part.safetensors"), "names '../part.safetensors'; expected .safetensors files"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter"),
    ],
)
def test_a_model_that_is_not_what_it_says_is_refused(good_model: Path, tmp_path: Path, damage, message: str):
    shutil.copytree(good_model, tmp_path / "model")
    load_model(tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "model")


def test_a_pipe_in_a_folder_is_not_waited_for(good_model: Path, tmp_path: Path):
    shutil.copytree(good_model, tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").unlink()
    os.mkfifo(tmp_path / "model" / "tokenizer_config.json")
    for load in (load_model, load_tokenizer):
        with pytest.raises(UserError, match="tokenizer_config.json: not a regular file"):
            load(tmp_path / "model")


def test_generation_is_not_steered_by_the_folder(good_model: Path, tmp_path: Path):
    shutil.copytree(good_model, tmp_path / "model")
    with_settings("generation_config.json", num_beams=3, repetition_penalty=9.0, num_return_sequences=3)(
        tmp_path / "model"
    )
    wanted = dict(samples=2, max_new_tokens=6, device="cpu")
    assert generate(tmp_path / "model", "quick fox", **wanted) == generate(good_model, "quick fox", **wanted)


def test_ids_beyond_the_vocabulary_are_refused_under_a_matching_manifest(data_folder: Path, tmp_path: Path):
    shutil.copytree(data_folder, tmp_path / "data")
    np.array([5, 300], dtype="<u2").tofile(tmp_path / "data" / "train-00000.bin")
    sign_again(tmp_path / "data")
    with pytest.raises(UserError, match="the train split holds token id 300, but the manifest says ids are below 300"):
        PreparedData.open(tmp_path / "data")


def test_another_tokenizer_than_the_manifests_is_refused(data_folder: Path, tmp_path: Path):
    shutil.copytree(data_folder, tmp_path / "data")
    with_settings("tokenizer/tokenizer_config.json", eos_token="a new one")(tmp_path / "data")
    sign_again(tmp_path / "data")
    with pytest.raises(UserError, match="has 301 entries and ids below 301, but the manifest says 300"):
        PreparedData.open(tmp_path / "data").load_tokenizer()


def test_an_id_that_would_fill_the_memory_is_refused(data_folder: Path, tmp_path: Path):
    shutil.copytree(data_folder / "tokenizer", tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["!"] = 2**31
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="has 300 entries, but an id of 2147483648"):
        resolve_tokenizer(str(tmp_path / "tokenizer"), list)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: " + "[" * 30 + "]" * 30, "nested more than 20 deep"),
        ("a: &a 1\nb: [" + "*a, " * 30 + "]", "more than 20 aliases"),
        ("a: " + "x" * 70_000, "has 70,003 bytes"),
    ],
)
def test_a_recipe_that_would_choke_a_parser_is_refused(tmp_path: Path, content: str, message: str):
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        check_recipe(tmp_path / "recipe.yaml")


def test_a_recipe_that_is_none_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="missing.yaml: no such file"):
        check_recipe(tmp_path / "missing.yaml")
    (tmp_path / "torn.yaml").write_text("data: [d\nout:")
    with pytest.raises(UserError, match="torn.yaml: parsing it as YAML failed"):
        check_recipe(tmp_path / "torn.yaml")
