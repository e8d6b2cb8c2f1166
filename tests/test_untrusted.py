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
from avatarl.cli import main
from avatarl.data import PreparedData
from avatarl.data.tokenizer import encode_texts, resolve_tokenizer
from avatarl.models import load_model, load_tokenizer
from avatarl.results import generate
from avatarl.untrusted import read_yaml

from .fuzz.damages import sign_again
from .fuzz.mutations import PICKLE

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
        (with_settings("config.json", attn_implementation={"": "owner/kernel"}), "code from the Hub is not run"),
        (with_settings("config.json", _attn_implementation="owner/kernel:function"), "code from the Hub is not run"),
        (with_settings("config.json", experts_implementation="owner/kernel"), "code from the Hub is not run"),
        (with_settings("config.json", transformers_weights="pytorch_model.bin"), "transformers_weights is"),
        (with_index("pytorch_model.bin"), "names 'pytorch_model.bin'; expected .safetensors files in the same folder"),
        (with_index("../part.safetensors"), "names '../part.safetensors'; expected .safetensors files"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter"),
    ],
)
def test_a_model_that_is_not_what_it_says_is_refused(player_folder: Path, tmp_path: Path, damage, message: str):
    shutil.copytree(player_folder, tmp_path / "model")
    load_model(tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "model")


def test_a_pipe_in_a_folder_is_not_waited_for(player_folder: Path, tmp_path: Path):
    shutil.copytree(player_folder, tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").unlink()
    os.mkfifo(tmp_path / "model" / "tokenizer_config.json")
    for load in (load_model, load_tokenizer):
        with pytest.raises(UserError, match="tokenizer_config.json: not a regular file"):
            load(tmp_path / "model")


def test_generation_is_not_steered_by_the_folder(player_folder: Path, tmp_path: Path):
    shutil.copytree(player_folder, tmp_path / "model")
    with_settings("generation_config.json", num_beams=3, repetition_penalty=9.0, num_return_sequences=3)(
        tmp_path / "model"
    )
    wanted = dict(samples=2, max_new_tokens=6, device="cpu")
    assert generate(tmp_path / "model", "quick fox", **wanted) == generate(player_folder, "quick fox", **wanted)


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


def replace(found: str, content: str) -> dict:
    return {"type": "Replace", "pattern": {"String": found}, "content": content}


def sequence(of: str, *steps: dict) -> dict:
    return {"type": "Sequence", of: list(steps)}


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
EACH = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
# A chain that no text reaches but by the one letter that its first step leaves.
NONE_OF_THESE = {"type": "Replace", "pattern": {"Regex": "[жюэщ]"}, "content": ""}
CHAIN = [
    {"type": "Replace", "pattern": {"Regex": "Ѭ"}, "content": "ж" * 64},
    *({"type": "Replace", "pattern": {"String": old}, "content": new * 64} for old, new in ("жю", "юэ", "эщ")),
]
EMPTY = {"type": "Replace", "pattern": {"Regex": ""}, "content": "▁"}
BERT = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": True}


@pytest.fixture
def tokenizer_with(data_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """``tokenizer_with(normalizer=…)``: the data's tokenizer with other parts."""

    def write(**parts: object) -> Path:
        folder = shutil.copytree(data_folder / "tokenizer", tmp_path / "tokenizer")
        with_settings("tokenizer.json", **parts)(folder)
        return folder

    return write


@pytest.mark.parametrize(
    ("part", "settings"),
    [
        ("normalizer", sequence("normalizers", *[replace("a", "bb"), replace("b", "aa")] * 20)),
        ("normalizer", sequence("normalizers", *[sequence("normalizers", *[replace("ζ", "ζζ")] * 20)] * 2)),
        ("normalizer", sequence("normalizers", *[replace("word", "wordword")] * 20)),
        ("normalizer", sequence("normalizers", *[EMPTY] * 20)),
        ("normalizer", sequence("normalizers", NONE_OF_THESE, *CHAIN)),
        ("decoder", sequence("decoders", NONE_OF_THESE, *CHAIN)),
        ("normalizer", sequence("normalizers", *[{"type": "ByteLevel"}] * 20)),
        ("normalizer", sequence("normalizers", *[replace("a", "ﷺ"), {"type": "NFKC"}, replace("ل", "a")] * 9)),
        ("pre_tokenizer", sequence("pretokenizers", *[BYTE_LEVEL] * 20)),
        ("pre_tokenizer", sequence("pretokenizers", *[EACH, BYTE_LEVEL] * 20)),
        ("decoder", sequence("decoders", *[replace("e", "ee")] * 20)),
        ("decoder", sequence("decoders", *[replace("", "a")] * 20)),
    ],
)
def test_a_tokenizer_that_makes_texts_longer_and_longer_is_refused(tokenizer_with, part: str, settings: dict):
    folder = tokenizer_with(**{part: settings})
    with pytest.raises(UserError, match=f"tokenizer.json: its {part} makes .* characters into more than"):
        resolve_tokenizer(str(folder), list)
    (folder / "tokenizer.json").rename(folder / "tokenizer.4.0.0.json")  # which a setting can name
    with pytest.raises(UserError, match=f"tokenizer.4.0.0.json: its {part} makes"):
        resolve_tokenizer(str(folder), list)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (sequence("normalizers", *[{"type": "NFC"}] * 65), "has 65 steps; at most 64 are expected"),
        (replace("ζ", "x" * 65), "has a text of 65 characters; at most 64 are expected"),
        (sequence("normalizers") | {"decoders": [{"type": "NFC"}] * 65}, "has 65 steps"),
        ({"type": "Prepend", "prepend": "x" * 10**6}, "has a text of 1,000,000 characters"),
        (sequence("normalizers", {"normalizers": [replace("a", "aa")] * 40}), "has a step of the type None"),
        (replace("a", "b") | {"normalizers": []}, "has a step of the type 'Replace'"),
        (replace("a", "b") | {"type": None}, "has a step of the type None"),
    ],
)
def test_steps_that_no_tokenizer_has_are_refused(tokenizer_with, settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        resolve_tokenizer(str(tokenizer_with(normalizer=settings)), list)


@pytest.mark.parametrize(
    "parts",
    [
        {
            "normalizer": sequence(
                "normalizers", {"type": "NFKC"}, {"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")
            )
        },
        {"normalizer": sequence("normalizers", BERT | {"lowercase": True}, EMPTY, replace("\n", "<|newline|>"))},
        {"normalizer": sequence("normalizers", *(replace(mark, "...") for mark in "…‥⋯、。，．"))},
        {"normalizer": {"type": "ByteLevel"}, "pre_tokenizer": None},
        {"pre_tokenizer": sequence("pretokenizers", {"type": "Digits", "individual_digits": True}, EACH, BYTE_LEVEL)},
        {"pre_tokenizer": sequence("pretokenizers", {"type": "WhitespaceSplit"}, METASPACE)},
        {"decoder": sequence("decoders", replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"})},
    ],
)
def test_steps_that_tokenizers_have_are_accepted(tokenizer_with, parts: dict):
    folder = tokenizer_with(**parts)
    (ids,) = encode_texts(resolve_tokenizer(str(folder), list).tokenizer, ["quick fox"])
    assert ids


def test_code_in_a_recipe_is_not_run(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = "!!python/object/apply:os.system ['touch exploited']"
    (tmp_path / "code.yaml").write_text(code)
    (tmp_path / "module_of_a_stranger.py").write_text("open('exploited', 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    named = ("avatarl: module_of_a_stranger.settings", "avatarl: {class_path: module_of_a_stranger.Settings}")
    in_yaml = (f"data: {code}", f'critic: "{code}"', "avatarl: code.yaml", "player: {settings: code.yaml}")
    for content in (*named, *in_yaml):
        (tmp_path / "recipe.yaml").write_text(f"out: o\nsteps: 1\n{content}\n")
        assert main(["train", "--config", "recipe.yaml", "--data", "missing"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1, content
        assert not (tmp_path / "exploited").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "recipe.yaml: no such file"),
        ("data: [d\nout:", r"recipe.yaml cannot be read \(while parsing"),
        ("a: " + "[" * 30 + "]" * 30, "recipe.yaml is nested more than 20 deep"),
        ("a: " + "x" * 70_000, "recipe.yaml cannot be read .has 70003 bytes"),
        ("a: &a 1\nb: [" + "*a, " * 30 + "]", "recipe.yaml has too many aliases"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "recipe.yaml has too many aliases"),
        ("a: &a {b: *a}", "recipe.yaml has too many aliases"),
    ],
    ids=["missing", "torn", "deep", "long", "many aliases", "aliases of aliases", "an alias of itself"],
)
def test_a_yaml_file_that_is_none_is_named(tmp_path: Path, content: str | None, message: str):
    if content is not None:
        (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        read_yaml(tmp_path / "recipe.yaml")


def test_aliases_that_stand_for_little_are_read(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("a: &a {x: 1, y: [1, 2]}\nb: *a\nc: {<<: *a, x: 2}\n")
    both = {"x": 1, "y": [1, 2]}
    assert read_yaml(tmp_path / "recipe.yaml") == {"a": both, "b": both, "c": {"x": 2, "y": [1, 2]}}
