"""Caches of critics: what is stored is what the critic says, and nothing else is taken for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from avatarl import UserError
from avatarl.cli import main
from avatarl.data import PreparedData, Windows
from avatarl.data.dataset import file_record
from avatarl.data.prepare import prepare
from avatarl.errors import RunFailed
from avatarl.models import CriticCache, cache_critic, load_critic
from avatarl.models.critic_cache import RecordFormat, is_cache, parts, write
from avatarl.models.critic_cache.read import record_format
from avatarl.models.critic_cache.record import NATS_PER_UNIT, decode, encode
from avatarl.models.loading import head_weight, last_hidden
from avatarl.objective import StoredCritic

from ..conftest import BLOCK, write_documents

COMMON = dict(block=BLOCK, precision="fp32", device="cpu", quiet=True)


@pytest.fixture(scope="module")
def data(data_folder: Path) -> PreparedData:
    return PreparedData.open(data_folder)


@pytest.fixture(scope="module")
def caches(tmp_path_factory, data_folder: Path, critic_folder: Path) -> dict[str, Path]:
    """One of each kind, and one that keeps the largest exactly."""
    folder = tmp_path_factory.mktemp("caches")
    kinds = {
        "top": dict(kind="top", bytes_per_token=54),
        "sample": dict(kind="sample", bytes_per_token=54),
        "both": dict(kind="sample", bytes_per_token=54, keep_top=5),
    }
    for name, settings in kinds.items():
        cache_critic(str(critic_folder), data_folder, folder / name, **settings, **COMMON)
    return {name: folder / name for name in kinds}


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of eight windows or so, of which the tiny data has some."""
    monkeypatch.setattr(parts, "SMALLEST_PART_BYTES", 1 << 13)


def probs_of(critic_folder: Path, data: PreparedData, split: str, indices: list[int]) -> tuple[Tensor, Tensor]:
    """The critic's whole distribution (B, T, V) in float64 at windows of the data, and the targets."""
    critic = load_critic(critic_folder, data.load_tokenizer())
    inputs, targets = Windows(getattr(data, split), BLOCK).batch(indices)
    with torch.no_grad():
        logits = last_hidden(critic, inputs) @ head_weight(critic).t()
    return logits.double().softmax(-1), targets


# --- records ---------------------------------------------------------------------------------------------------------


def test_codes():
    exact = torch.tensor([0.0, -NATS_PER_UNIT, -1.0, -31.5, -40.0, -torch.inf])
    found = decode(encode(exact))
    assert found.tolist() == [0.0, -NATS_PER_UNIT, -1.0, -31.5, -(2**16 - 2) * NATS_PER_UNIT, -torch.inf]
    many = -20 * torch.rand(10_000, generator=torch.Generator().manual_seed(1))
    assert (decode(encode(many)) - many).abs().max() <= NATS_PER_UNIT / 2 + 1e-6 < 1 / 4000


@pytest.mark.parametrize(
    "kind, budget, keep, vocabulary, expected",
    [
        ("top", 70, 0, 50_257, (16, 0, 70)),
        ("top", 40, 0, 50_257, (8, 0, 38)),
        ("top", 300, 0, 65_536, (73, 0, 298)),
        ("top", 300, 0, 151_936, (49, 0, 300)),
        ("top", 300, 0, 20, (20, 0, 86)),
        ("sample", 70, 0, 50_257, (0, 32, 70)),
        ("sample", 70, 8, 50_257, (8, 16, 70)),
        ("sample", 70, 4, 151_936, (4, 10, 70)),
    ],
)
def test_what_a_budget_buys(kind, budget, keep, vocabulary, expected):
    record = RecordFormat.within(kind, budget, keep, vocabulary)
    assert (record.num_top, record.num_draws, record.dtype.itemsize) == expected


@pytest.mark.parametrize("vocabulary", [300, 70_000])
def test_records_there_and_back(vocabulary):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (5, 1 + 4 + 3), generator=generator)
    held = StoredCritic(
        ids[:, :5],
        -torch.rand(5, 5, generator=generator),
        -torch.rand(5),
        ids[:, 5:],
        torch.rand(5) * 8,
        torch.zeros(vocabulary),
    )
    record = RecordFormat(4, 3, vocabulary)
    found = record.unpack(record.pack(held), ids[:, 0], held.log_frequencies)
    assert torch.equal(found.tokens, held.tokens) and torch.equal(found.draws, held.draws)
    for one, other in (
        (found.log_probs, held.log_probs),
        (found.log_rest, held.log_rest),
        (found.entropy, held.entropy),
    ):
        assert (one - other).abs().max() <= NATS_PER_UNIT


# --- what is stored --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("name", ["top", "sample", "both"])
def test_what_is_stored_is_what_the_critic_says(caches, critic_folder, data, name, split):
    indices = [5, 0, 11]
    held = CriticCache.open(caches[name], data, BLOCK).rows(split, indices)
    probs, targets = probs_of(critic_folder, data, split, indices)
    assert torch.equal(held.tokens[..., 0], targets)
    torch.testing.assert_close(held.log_probs.double(), probs.gather(-1, held.tokens).log(), rtol=0, atol=NATS_PER_UNIT)
    num_top = {"top": 12, "sample": 0, "both": 5}[name]
    assert (held.num_top, held.num_draws) == (num_top, {"top": 0, "sample": 24, "both": 14}[name])
    assert torch.equal(held.tokens[..., 1:], probs.topk(num_top).indices)
    others = probs.scatter(-1, held.tokens, 0.0)
    torch.testing.assert_close(held.log_rest.double(), others.sum(-1).log(), rtol=0, atol=2 * NATS_PER_UNIT)
    counts = torch.bincount(torch.from_numpy(data.train.slice(0, len(data.train))), minlength=data.vocab_size) + 1.0
    torch.testing.assert_close(held.log_frequencies, (counts / counts.sum()).log())
    entropy = -(probs * probs.log()).sum(-1)
    torch.testing.assert_close(held.entropy.double(), entropy, rtol=0, atol=NATS_PER_UNIT)
    assert not (held.draws.unsqueeze(-1) == held.tokens.unsqueeze(-2)).any()  # drawn outside of what is stored


def test_drawn_tokens_follow_the_critic(critic_folder, data):
    """A token is drawn as often as it is likely: within five standard errors, and three draws where rare."""
    probs, targets = (x.flatten(0, 1) for x in probs_of(critic_folder, data, "train", [0, 3]))
    critic = load_critic(critic_folder, data.load_tokenizer())
    inputs, _ = Windows(data.train, BLOCK).batch([0, 3])
    with torch.no_grad():
        hidden = last_hidden(critic, inputs).flatten(0, 1)
    record, seeds, counts = RecordFormat(0, 24, data.vocab_size), range(200), torch.zeros_like(probs)
    for seed in seeds:
        uniforms = torch.cat([write.draw_uniforms(seed, "train", [window], BLOCK) for window in (0, 3)])
        (held,) = write.answers_of(hidden, head_weight(critic).detach(), targets, record, uniforms)
        counts.scatter_add_(1, held.draws, torch.ones_like(held.draws).double())
    probs.scatter_(1, targets.unsqueeze(1), 0.0)
    probs /= probs.sum(1, keepdim=True)
    draws = 24 * len(seeds)
    error = (counts / draws - probs).abs()
    assert (error <= 5 * (probs * (1 - probs) / draws).sqrt() + 3 / draws).all()
    assert error.max() > 1e-4  # they are draws


@pytest.mark.parametrize("split", ["train", "valid"])
def test_every_window_has_its_own_place(tmp_path, caches, critic_folder, data_folder, data, monkeypatch, split):
    """In a cache of many parts, the last of them shorter, as in one of a single part."""
    windows = range(len(Windows(getattr(data, split), BLOCK)))
    one = CriticCache.open(caches["top"], data, BLOCK).rows(split, windows)
    monkeypatch.setattr(parts, "SMALLEST_PART_BYTES", 1 << 13)
    cache_critic(str(critic_folder), data_folder, tmp_path / "cache", bytes_per_token=54, **COMMON)
    sizes = {path.stat().st_size for path in (tmp_path / "cache").glob(f"{split}-*.bin")}
    assert len(sizes) == 2  # that of the last part, and that of the others
    many = CriticCache.open(tmp_path / "cache", data, BLOCK).rows(split, windows)
    assert torch.equal(one.tokens, many.tokens) and torch.equal(one.log_probs, many.log_probs)


def test_training_and_validation_draw_apart():
    assert not torch.equal(write.draw_uniforms(1, "train", range(2), 8), write.draw_uniforms(1, "valid", range(2), 8))


def test_another_seed_draws_other_tokens_and_the_same_one_the_same(tmp_path, caches, data_folder, critic_folder):
    again = dict(kind="sample", bytes_per_token=54, **COMMON)
    cache_critic(str(critic_folder), data_folder, tmp_path / "same", batch_windows=3, **again)
    cache_critic(str(critic_folder), data_folder, tmp_path / "other", seed=2, **again)
    same, other = ((tmp_path / name / "train-00000.bin").read_bytes() for name in ("same", "other"))
    records = np.frombuffer((caches["sample"] / "train-00000.bin").read_bytes(), np.uint8)
    assert (np.frombuffer(same, np.uint8) == records).all() and (np.frombuffer(other, np.uint8) != records).any()


# --- interruptions and processes -------------------------------------------------------------------------------------


def test_going_on_after_an_interruption(tmp_path, caches, data_folder, critic_folder, data, small_parts, monkeypatch):
    settings = dict(kind="both", **COMMON) | dict(kind="sample", bytes_per_token=54, keep_top=5)
    whole = cache_critic(str(critic_folder), data_folder, tmp_path / "whole", **settings)
    assert len(whole["files"]) > 4
    real, begun = write.fill_part, []

    def fails_in_the_third(out, part, *arguments):
        begun.append(part)
        if len(begun) == 3:
            (out / f".{part.name}.0123.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        real(out, part, *arguments)

    monkeypatch.setattr(write, "fill_part", fails_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        cache_critic(str(critic_folder), data_folder, tmp_path / "parts", **settings)
    with pytest.raises(UserError, match=r"not finished, it covers \d+ of 499 windows; repeat the command"):
        CriticCache.open(tmp_path / "parts", data, BLOCK)
    assert is_cache(tmp_path / "parts")
    cache_critic(str(critic_folder), data_folder, tmp_path / "parts", **settings)
    num_parts = len(whole["files"]) - 1
    assert len(begun) == 3 + num_parts - 2  # two were there
    contents = [{path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in ("whole", "parts")]
    assert contents[0] == contents[1]
    begun.clear()
    assert cache_critic(str(critic_folder), data_folder, tmp_path / "parts", **settings) == whole and not begun


def test_processes_share_the_parts(tmp_path, data_folder, critic_folder, small_parts, monkeypatch):
    settings = dict(kind="top", bytes_per_token=54, **COMMON)
    whole = cache_critic(str(critic_folder), data_folder, tmp_path / "one", **settings)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        found = cache_critic(str(critic_folder), data_folder, tmp_path / "two", **settings)
        assert ("files" in found) == (rank == "0")  # the last one finishes it
    assert found == whole
    for folder in (tmp_path / "one", tmp_path / "two"):
        assert {path.name for path in folder.iterdir()} == {"cache.json", *whole["files"]}


def test_two_starts_of_one_command_do_not_disturb_each_other(
    tmp_path, caches, data_folder, critic_folder, data, monkeypatch
):
    """The second begins in the middle of the first one's part, and is killed in the middle of its own."""
    settings = dict(bytes_per_token=54, batch_windows=64, **COMMON)
    real, calls = write.answers_of, []

    def answers(*arguments):
        calls.append(None)
        number = len(calls)
        if number == 3:
            with pytest.raises(KeyboardInterrupt):
                cache_critic(str(critic_folder), data_folder, tmp_path / "cache", **settings)
        if number == 5:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(write, "answers_of", answers)
    cache_critic(str(critic_folder), data_folder, tmp_path / "cache", **settings)
    assert len(calls) > 8
    names = {path.name for path in (tmp_path / "cache").iterdir()}
    assert names == {path.name for path in caches["top"].iterdir()}
    assert all((tmp_path / "cache" / name).read_bytes() == (caches["top"] / name).read_bytes() for name in names)


def test_what_a_kill_at_the_very_end_leaves_is_tidied_up(tmp_path, caches, data_folder, critic_folder):
    cache = Path(shutil.copytree(caches["top"], tmp_path / "cache"))
    for name in ("cache.partial.json", "train-00000.bin.json", ".train-00000.bin.0123.partial"):
        (cache / name).write_text("{}")
    cache_critic(str(critic_folder), data_folder, cache, bytes_per_token=54, **COMMON)
    assert {path.name for path in cache.iterdir()} == {path.name for path in caches["top"].iterdir()}


def test_answers_that_are_no_numbers(tmp_path, data_folder, critic_folder, monkeypatch):
    monkeypatch.setattr(write, "last_hidden", lambda model, ids: torch.full((*ids.shape, 16), torch.nan))
    with pytest.raises(RunFailed, match="says what is no number in train windows 0 to 15; try precision fp32"):
        cache_critic(str(critic_folder), data_folder, tmp_path / "cache", bytes_per_token=54, **COMMON)
    assert not list((tmp_path / "cache").glob("train-*"))


# --- what is refused -------------------------------------------------------------------------------------------------


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
        {"block": 0},
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
    with pytest.raises(UserError, match="covers 460 train and 3 valid windows; expected all, 460 and 39"):
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
    with pytest.raises(UserError, match="log_frequencies.bin: holds what is no logarithm of a frequency; make it"):
        CriticCache.open(cache, data, BLOCK)


def test_other_data_tokenizer_or_windows(caches, tmp_path, data_folder, data):
    with pytest.raises(UserError, match="a cache of windows of 16 tokens; expected block, 8; make it anew with .* 8"):
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
        (dict(block=0), "block is 0; expected a whole number of at least 1"),
        (dict(block=17), "block is 17; expected at most 16, what critic .* was made to read"),
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
    with pytest.raises(UserError, match="a cache of num_top 12, where 8 is asked for; give another folder"):
        cache_critic(out=caches["top"], **again | dict(bytes_per_token=40))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_disk_without_room(tmp_path, data_folder, critic_folder, monkeypatch):
    monkeypatch.setattr(parts.shutil, "disk_usage", lambda _: parts.shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(RunFailed, match="needs 0.0 GB more, and 0.0 GB are free; a smaller bytes_per_token needs less"):
        cache_critic(str(critic_folder), data_folder, tmp_path / "cache", **COMMON)


def test_the_command(tmp_path, data_folder, critic_folder, capsys):
    arguments = ["--critic", str(critic_folder), "--data", str(data_folder), "--out", str(tmp_path / "cache")]
    assert main(["critic", "cache", *arguments, "--block", "16", "--bytes_per_token", "70", "--device", "cpu"]) == 0
    assert "finished; 7,984 tokens at 70 bytes: 16 most likely and 0 drawn tokens a position" in capsys.readouterr().out
    assert main(["critic", "cash"]) == 2
    assert (
        capsys.readouterr().err.strip()
        == "avatarl: critic is followed by 'cash'; expected cache; did you mean 'cache'?"
    )
