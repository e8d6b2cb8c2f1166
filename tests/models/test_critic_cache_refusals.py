"""Caches of critics: nothing is taken for one that is not what the command writes, of this critic and this data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from avatarl import UserError
from avatarl.data import PreparedData
from avatarl.data.dataset import file_record
from avatarl.data.prepare import prepare
from avatarl.errors import RunFailed
from avatarl.models import CriticCache, cache_critic
from avatarl.models.critic_cache import parts
from avatarl.models.critic_cache.read import record_format

from ..conftest import BLOCK, write_documents
from .conftest import COMMON


def damaged(caches, tmp_path: Path) -> Path:
    return Path(shutil.copytree(caches["top"], tmp_path / "cache"))


def test_a_flipped_byte(caches, tmp_path, data):
    cache = damaged(caches, tmp_path)
    content = bytearray((cache / "valid-00000.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (cache / "valid-00000.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"valid-00000.bin: changed since it was written \(its SHA-256 is another\)"):
        CriticCache.open(cache, data, BLOCK)


def test_files_that_are_cut_or_missing(caches, tmp_path, data):
    cache = damaged(caches, tmp_path)
    file = cache / "train-00000.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"train-00000.bin: has \d+ bytes; \d+ are expected"):
        CriticCache.open(cache, data, BLOCK)
    file.unlink()
    with pytest.raises(UserError, match="train-00000.bin: missing"):
        CriticCache.open(cache, data, BLOCK)


@pytest.mark.parametrize(
    "changes",
    [
        {"windows": {"train": 10, "valid": 39}},
        {"num_top": 11},
        {"num_top": -1},
        {"bytes_per_token": 10**30},
        {"critic": {}},
        {"files": {}},
        {"files": {"../../etc/passwd": {"bytes": 1, "sha256": "0"}}},
        {"block_size": 0},
    ],
)
def test_a_manifest_that_says_other_things(caches, tmp_path, data, changes):
    cache = damaged(caches, tmp_path)
    manifest = json.loads((cache / "cache.json").read_text())
    (cache / "cache.json").write_text(json.dumps(manifest | changes))
    with pytest.raises(UserError, match="not what `avatarl critic cache` writes|covers|bytes are expected"):
        CriticCache.open(cache, data, BLOCK)


def test_a_cache_of_a_fraction(caches, tmp_path, data):
    """A manifest that is whole in itself, of fewer windows than the data has."""
    cache = damaged(caches, tmp_path)
    manifest = json.loads((cache / "cache.json").read_text())
    manifest["windows"]["valid"] = 3
    content = (cache / "valid-00000.bin").read_bytes()[: 3 * BLOCK * manifest["bytes_per_token"]]
    (cache / "valid-00000.bin").write_bytes(content)
    manifest["files"]["valid-00000.bin"] = file_record(cache / "valid-00000.bin")
    (cache / "cache.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="covers 460 train and 3 valid windows; expected 460 and 39"):
        CriticCache.open(cache, data, BLOCK)


def sign_anew(cache: Path, name: str) -> None:
    """Let the manifest say that a file is as it was written."""
    manifest = json.loads((cache / "cache.json").read_text())
    manifest["files"][name] = file_record(cache / name)
    (cache / "cache.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("kind, field", [("top", "top"), ("sample", "draws"), ("both", "top"), ("both", "draws")])
def test_a_token_that_is_none_in_a_cache_that_is_signed(caches, tmp_path, data, kind, field):
    cache = Path(shutil.copytree(caches[kind], tmp_path / "cache"))
    record = record_format(json.loads((cache / "cache.json").read_text()))
    records = np.fromfile(cache / "train-00000.bin", record.dtype)
    for token in (data.vocab_size - 1, data.vocab_size):
        records[field][7, 2] = token
        records.tofile(cache / "train-00000.bin")
        sign_anew(cache, "train-00000.bin")
        if token < data.vocab_size:
            CriticCache.open(cache, data, BLOCK)
    with pytest.raises(UserError, match=f"train-00000.bin: holds a token id that is none of {data.vocab_size}; make"):
        CriticCache.open(cache, data, BLOCK)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.5])
def test_a_frequency_that_is_none_in_a_cache_that_is_signed(caches, tmp_path, data, value):
    cache = damaged(caches, tmp_path)
    log_frequencies = np.fromfile(cache / "log_frequencies.bin", "<f4")
    log_frequencies[3] = value
    log_frequencies.tofile(cache / "log_frequencies.bin")
    sign_anew(cache, "log_frequencies.bin")
    with pytest.raises(
        UserError, match="log_frequencies.bin: holds a number that is no logarithm of a frequency; make it"
    ):
        CriticCache.open(cache, data, BLOCK)


def test_other_data_tokenizer_or_windows(caches, tmp_path, data_folder, data):
    with pytest.raises(
        UserError, match="a cache of windows of 16 tokens; expected block_size, 8; make it anew with .* 8"
    ):
        CriticCache.open(caches["top"], data, 8)
    source = write_documents(tmp_path / "documents.jsonl", count=60, seed=2)
    prepare([str(source)], tmp_path / "other", tokenizer=str(data_folder / "tokenizer"), quiet=True)
    with pytest.raises(UserError, match=f"a cache of other data than {tmp_path / 'other'}"):
        CriticCache.open(caches["top"], PreparedData.open(tmp_path / "other"), BLOCK)
    prepare([str(source)], tmp_path / "third", tokenizer="bpe:290", quiet=True)
    with pytest.raises(UserError, match="a cache of other data and another tokenizer than"):
        CriticCache.open(caches["top"], PreparedData.open(tmp_path / "third"), BLOCK)


def test_a_critic_that_has_changed_since(tmp_path, data_folder, critic_folder, data):
    critic = shutil.copytree(critic_folder, tmp_path / "critic")
    cache_critic(str(critic), data_folder, tmp_path / "cache", bytes_per_token=54, **COMMON)
    CriticCache.open(tmp_path / "cache", data, BLOCK)
    weights = bytearray((critic / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (critic / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="critic .*critic has changed since the cache was made of it"):
        CriticCache.open(tmp_path / "cache", data, BLOCK)
    with pytest.raises(UserError, match="a cache of another critic; give another folder"):
        cache_critic(str(critic), data_folder, tmp_path / "cache", bytes_per_token=54, **COMMON)
    shutil.rmtree(critic)
    CriticCache.open(tmp_path / "cache", data, BLOCK)  # who has the cache needs the critic no more


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(kind="mass"), "kind is 'mass'; expected one of 'top', 'sample'"),
        (dict(bytes_per_token=9), "bytes_per_token is 9; expected at least 10 for one token of kind 'top'"),
        (dict(kind="sample", keep_top=301), "bytes_per_token is 54; expected at least 1212 for one token of kind 'sa"),
        (dict(keep_top=2), "keep_top is 2, which kind='sample' uses"),
        (dict(block_size=0), "block_size is 0; expected a whole number of at least 1"),
        (dict(block_size=17), "block_size is 17; expected at most 16, what critic .* was made to read"),
        (dict(precision="fp16"), "precision is 'fp16'; expected one of 'auto', 'bf16', 'fp32'"),
    ],
)
def test_settings_that_make_no_cache(tmp_path, data_folder, critic_folder, settings, message):
    with pytest.raises(UserError, match=message):
        cache_critic(
            str(critic_folder), data_folder, tmp_path / "cache", **COMMON | dict(bytes_per_token=54) | settings
        )
    assert not (tmp_path / "cache").exists()


def test_folders_that_hold_something_else(tmp_path, caches, data_folder, critic_folder):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("a file")
    again = dict(critic=str(critic_folder), data=data_folder, bytes_per_token=54, **COMMON)
    with pytest.raises(UserError, match="which already holds files"):
        cache_critic(out=tmp_path / "mine", **again)
    with pytest.raises(UserError, match="which is a file"):
        cache_critic(out=tmp_path / "file", **again)
    with pytest.raises(UserError, match="a cache of num_top 12, not 8; give another folder"):
        cache_critic(out=caches["top"], **again | dict(bytes_per_token=40))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_disk_without_room(tmp_path, data_folder, critic_folder, monkeypatch):
    monkeypatch.setattr(parts.shutil, "disk_usage", lambda _: parts.shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(RunFailed, match="needs 0.0 GB more, and 0.0 GB are free; a smaller bytes_per_token needs less"):
        cache_critic(str(critic_folder), data_folder, tmp_path / "cache", **COMMON)
