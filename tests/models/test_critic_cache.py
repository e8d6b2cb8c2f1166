"""Caches of critics: what is stored is what the critic says, and nothing else is taken for it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from avatarl import AvataRLConfig, UserError, avatarl_loss, reward_landscape
from avatarl.cli import main
from avatarl.data import PreparedData, Windows
from avatarl.errors import RunFailed
from avatarl.models import CriticCache, cache_critic, load_critic
from avatarl.models.critic_cache import RecordFormat, answers, is_cache, parts
from avatarl.models.critic_cache.record import NATS_PER_UNIT, decode, encode
from avatarl.models.loading import head_weight, last_hidden
from avatarl.objective import CachedAnswers

from ..conftest import BLOCK
from .conftest import COMMON


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
    held = CachedAnswers(
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


def sharp_logits(spread: float, vocabulary: int = 64, positions: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """Of a player and a critic (N, V), and targets (N,)."""
    generator = torch.Generator().manual_seed(1)
    critic, player = (torch.randn(positions, vocabulary, generator=generator) for _ in range(2))
    return 3 * player, spread * critic, torch.randint(vocabulary, (positions,), generator=generator)


@pytest.mark.parametrize("spread", [3.0, 10.0, 15.0])
@pytest.mark.parametrize("num_top", [0, 5, 60])
def test_the_mass_of_the_rest_is_summed(num_top, spread):
    """One minus what is known, in float32, is −15.9 or −∞ where this is −25."""
    _, critic, targets = sharp_logits(spread)
    (held,) = answers.answers_of(critic, torch.eye(64), targets, RecordFormat(num_top, 0, 64), None)
    others = critic.double().log_softmax(1).scatter(1, held.tokens, -torch.inf)
    torch.testing.assert_close(held.log_rest.double(), others.logsumexp(1), rtol=0, atol=1e-4)
    assert (held.log_rest < -17).any() or num_top == 0 or spread == 3


@pytest.mark.parametrize("spread", [1.0, 3.0, 10.0, 15.0])
@pytest.mark.parametrize("tail", ["renormalise", "target"])
@pytest.mark.parametrize("pool", ["geometric", "arithmetic"])
def test_a_cache_of_every_token_gives_the_live_losses(pool, tail, spread):
    player, critic, targets = sharp_logits(spread)
    record = RecordFormat(64, 0, 64)
    (answer,) = answers.answers_of(critic, torch.eye(64), targets, record, None)
    held = record.unpack(record.pack(answer), targets, torch.zeros(64))
    for config in (AvataRLConfig(top_k=4, pool=pool, tail=tail, threshold="none"), AvataRLConfig.released()):
        live, cached = (avatarl_loss(player, each, targets, config)[0].item() for each in (critic, held))
        assert cached == pytest.approx(live, rel=2e-3)
        rewards = [reward_landscape(player, each, targets, config).rewards for each in (critic, held)]
        assert (rewards[1] - rewards[0]).abs().mean() < 2e-3 * rewards[0].mean()


def test_a_record_has_a_floor():
    """docs/critics.md: e⁻³² for all that is less likely, and nothing for what is impossible."""
    codes = encode(torch.tensor([-31.9, -32.0, -40.0, -1e30, -torch.inf]))
    assert decode(codes).tolist() == pytest.approx([-31.9, -32.0, -32.0, -32.0, -torch.inf], abs=1e-3)


def test_drawn_tokens_follow_the_critic(critic_folder, data):
    """A token is drawn as often as it is likely: within five standard errors, and three draws where rare."""
    probs, targets = (x.flatten(0, 1) for x in probs_of(critic_folder, data, "train", [0, 3]))
    critic = load_critic(critic_folder, data.load_tokenizer())
    inputs, _ = Windows(data.train, BLOCK).batch([0, 3])
    with torch.no_grad():
        hidden = last_hidden(critic, inputs).flatten(0, 1)
    record, seeds, counts = RecordFormat(0, 24, data.vocab_size), range(200), torch.zeros_like(probs)
    for seed in seeds:
        uniforms = torch.cat([answers.draw_uniforms(seed, "train", [window], BLOCK) for window in (0, 3)])
        (held,) = answers.answers_of(hidden, head_weight(critic).detach(), targets, record, uniforms)
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
    assert not torch.equal(
        answers.draw_uniforms(1, "train", range(2), 8), answers.draw_uniforms(1, "valid", range(2), 8)
    )


def test_another_seed_draws_other_tokens_and_the_same_one_the_same(tmp_path, caches, data_folder, critic_folder):
    again = dict(kind="sample", bytes_per_token=54, **COMMON)
    cache_critic(str(critic_folder), data_folder, tmp_path / "same", micro_batch_size=3, **again)
    cache_critic(str(critic_folder), data_folder, tmp_path / "other", seed=2, **again)
    same, other = ((tmp_path / name / "train-00000.bin").read_bytes() for name in ("same", "other"))
    records = np.frombuffer((caches["sample"] / "train-00000.bin").read_bytes(), np.uint8)
    assert (np.frombuffer(same, np.uint8) == records).all() and (np.frombuffer(other, np.uint8) != records).any()


# --- interruptions and processes -------------------------------------------------------------------------------------


def test_going_on_after_an_interruption(tmp_path, caches, data_folder, critic_folder, data, small_parts, monkeypatch):
    settings = dict(kind="both", **COMMON) | dict(kind="sample", bytes_per_token=54, keep_top=5)
    whole = cache_critic(str(critic_folder), data_folder, tmp_path / "whole", **settings)
    assert len(whole["files"]) > 4
    real, begun = answers.fill_part, []

    def fails_in_the_third(out, part, *arguments):
        begun.append(part)
        if len(begun) == 3:
            (out / f".{part.name}.0123.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        real(out, part, *arguments)

    monkeypatch.setattr(answers, "fill_part", fails_in_the_third)
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
    settings = dict(bytes_per_token=54, micro_batch_size=64, **COMMON)
    real, calls = answers.answers_of, []

    def interrupted(*arguments):
        calls.append(None)
        number = len(calls)
        if number == 3:
            with pytest.raises(KeyboardInterrupt):
                cache_critic(str(critic_folder), data_folder, tmp_path / "cache", **settings)
        if number == 5:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(answers, "answers_of", interrupted)
    cache_critic(str(critic_folder), data_folder, tmp_path / "cache", **settings)
    assert len(calls) > 8
    names = {path.name for path in (tmp_path / "cache").iterdir()}
    assert names == {path.name for path in caches["top"].iterdir()}
    assert all((tmp_path / "cache" / name).read_bytes() == (caches["top"] / name).read_bytes() for name in names)


def test_a_file_that_is_tidied_away_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    """Another process looks for what nobody holds between the making of a file and its lock."""
    real, locked = parts.fcntl.flock, []

    def flock(file, operation):
        if operation == parts.fcntl.LOCK_EX:
            locked.append(file.name)
            if len(locked) <= 2:
                parts.tidy(tmp_path)
        real(file, operation)

    monkeypatch.setattr(parts.fcntl, "flock", flock)
    parts.write_whole(tmp_path / "part.bin", b"whole")
    assert (tmp_path / "part.bin").read_bytes() == b"whole" and len(locked) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["part.bin"]


def test_a_cache_that_is_finished_while_another_process_starts(
    tmp_path, caches, data_folder, critic_folder, monkeypatch
):
    """What described the unfinished cache is gone when the second process, which has seen it, comes to read it."""
    cache = Path(shutil.copytree(caches["top"], tmp_path / "cache"))
    names = sorted(path.name for path in cache.iterdir())
    seen = {*names, "cache.partial.json"} - {"cache.json"}
    with monkeypatch.context() as patched:
        patched.setattr(parts.os, "listdir", lambda _: list(seen))
        cache_critic(str(critic_folder), data_folder, cache, bytes_per_token=54, **COMMON)
    assert sorted(path.name for path in cache.iterdir()) == names


def test_what_a_kill_at_the_very_end_leaves_is_tidied_up(tmp_path, caches, data_folder, critic_folder):
    cache = Path(shutil.copytree(caches["top"], tmp_path / "cache"))
    for name in ("cache.partial.json", "train-00000.bin.json", ".train-00000.bin.0123.partial"):
        (cache / name).write_text("{}")
    cache_critic(str(critic_folder), data_folder, cache, bytes_per_token=54, **COMMON)
    assert {path.name for path in cache.iterdir()} == {path.name for path in caches["top"].iterdir()}


def test_what_has_no_name_of_a_cache_stays(tmp_path, caches, data_folder, critic_folder):
    cache = Path(shutil.copytree(caches["top"], tmp_path / "cache"))
    strangers = [cache / name for name in (".notes.partial", ".thesis.txt.0123.partial", "other.bin.json")]
    for path in strangers:
        path.write_text("precious")
    (cache / ".train-00000.bin.0123.partial").symlink_to(strangers[0])
    os.mkfifo(cache / ".train-00000.bin.4567.partial")  # which is not waited for
    cache_critic(str(critic_folder), data_folder, cache, bytes_per_token=54, **COMMON)
    assert all(path.read_text() == "precious" for path in strangers)


@pytest.mark.parametrize("advice", ["bf16; try precision fp32", "fp32; give another critic"])
def test_answers_that_are_no_numbers(advice, tmp_path, data_folder, critic_folder, monkeypatch):
    monkeypatch.setattr(answers, "last_hidden", lambda model, ids: torch.full((*ids.shape, 16), torch.nan))
    settings = COMMON | {"precision": advice[:4], "bytes_per_token": 54}
    with pytest.raises(RunFailed, match=f"produced NaN in train windows 0-15, in {advice}"):
        cache_critic(str(critic_folder), data_folder, tmp_path / "cache", **settings)
    assert not list((tmp_path / "cache").glob("train-*"))


def test_the_command(tmp_path, data_folder, critic_folder, capsys):
    arguments = ["--critic", str(critic_folder), "--data", str(data_folder), "--out", str(tmp_path / "cache")]
    assert (
        main(["critic", "cache", *arguments, "--block_size", "16", "--bytes_per_token", "70", "--device", "cpu"]) == 0
    )
    assert "finished; 7,984 tokens at 70 bytes: 16 most likely and 0 drawn tokens a position" in capsys.readouterr().out
    assert main(["critic", "cash"]) == 2
    assert (
        capsys.readouterr().err.strip()
        == "avatarl: critic is followed by 'cash'; expected cache; did you mean 'cache'?"
    )


@pytest.mark.parametrize("kind, expected", [("model", BLOCK), ("run", 8), ("no run", BLOCK), ("random", 256)])
def test_the_default_block_size_is_the_context_of_the_critic(
    tmp_path, data_folder, critic_folder, capfd, kind: str, expected: int
):
    critic = "random:1m:7"
    if kind != "random":
        critic = str(shutil.copytree(critic_folder, tmp_path / "critic"))
    if kind in ("run", "no run"):
        (tmp_path / "critic" / "config.yaml").write_text({"run": "block_size: 8\n", "no run": "[block_size]\n"}[kind])
    settings = COMMON | {"block_size": None, "quiet": False, "train_windows": 2}
    manifest = cache_critic(critic, data_folder, tmp_path / "cache", bytes_per_token=54, **settings)
    assert manifest["block_size"] == expected
    assert f"block_size is {expected}, the context of critic {critic}" in capfd.readouterr().err.splitlines()[0]


def test_validation_windows_cost_nothing(critic_cache: Path, data_folder: Path):
    """They serve evaluations, which a live critic judges for nothing."""
    cache = CriticCache.open(critic_cache, PreparedData.open(data_folder), BLOCK)
    cost = cache.flops
    assert cost == cache.manifest["critic"]["flops_per_token"] * cache.manifest["windows"]["train"] * BLOCK
    cache.manifest["windows"]["valid"] *= 10
    assert cache.flops == cost


# --- a part of the text -----------------------------------------------------------------------------------------------


def test_a_cache_of_a_part_of_the_text_answers_for_its_windows_and_is_refused_for_others(
    data_folder: Path, critic_folder: Path, critic_cache: Path, tmp_path: Path
):
    out, data = tmp_path / "part", PreparedData.open(data_folder)
    every_token = 6 + 4 * 300
    manifest = cache_critic(
        str(critic_folder), data_folder, out, bytes_per_token=every_token, train_windows=5, **COMMON
    )
    whole, part = CriticCache.open(critic_cache, data, BLOCK), CriticCache.open(out, data, BLOCK, train_windows=5)
    last = len(Windows(data.train, BLOCK)) - 1
    same = [(0, 0), (1, round(last / 4)), (4, last)]
    for index, of_whole in same:
        found, expected = part.rows("train", [index]), whole.rows("train", [of_whole])
        assert found.log_probs.equal(expected.log_probs)
        assert found.tokens.equal(expected.tokens)
    assert part.rows("valid", [3]).log_probs.equal(whole.rows("valid", [3]).log_probs)
    assert manifest["windows"] == {"train": 5, "valid": whole.manifest["windows"]["valid"]}
    assert part.flops * len(Windows(data.train, BLOCK)) == whole.flops * 5
    for wanted in (None, 4):
        with pytest.raises(UserError, match="covers 5 train and .* windows; expected .* --train_windows"):
            CriticCache.open(out, data, BLOCK, train_windows=wanted)
