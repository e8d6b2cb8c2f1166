"""The numbers of an evaluation against plain ones, computed another way from the model's own logits."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from avatarl import AvataRLConfig, UserError, avatarl_loss
from avatarl.cli import main
from avatarl.data import PreparedData
from avatarl.data.prepare import prepare
from avatarl.models import build_player, cache_critic, critics
from avatarl.results import evaluate, likelihood, read_pairs, score_pairs
from avatarl.training import train

from ..conftest import BLOCK, TINY_PLAYER, save_model, write_documents
from ..tokenizers_of_kinds import save_tokenizer

REWARDS = AvataRLConfig(top_k=4, threshold="none", entropy_coef=0.02)
TABLES = ("reliability", "top16_reliability")


def windows_of(data: PreparedData, split: str = "valid", block_size: int = BLOCK) -> Tensor:
    """Every window with the token after it, (windows, block_size + 1), cut out of the stream by hand."""
    stream = data.valid if split == "valid" else data.train
    ids = stream.slice(0, len(stream))
    count = (len(ids) - 1) // block_size
    return torch.from_numpy(np.stack([ids[i * block_size : i * block_size + block_size + 1] for i in range(count)]))


def logits_of(folder: Path, inputs: Tensor) -> Tensor:
    """The logits as any user of transformers has them."""
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(inputs).logits.double()


def without_rounding(result: dict) -> dict:
    """A result whose numbers compare approximately."""
    return {
        name: pytest.approx(value, rel=1e-5, abs=1e-7) if isinstance(value, float) else value
        for name, value in result.items()
        if name not in ("rewards", *TABLES)
    }


# --- against the model's own logits ---------------------------------------------------------------------------------


def test_the_numbers_are_those_of_the_models_logits(data_folder: Path, player_folder: Path, tokenizer):
    data = PreparedData.open(data_folder)
    windows = windows_of(data)
    inputs, targets = windows[:, :-1], windows[:, 1:]
    logits = logits_of(player_folder, inputs).flatten(0, 1)
    probs = logits.softmax(-1)
    of_target = probs.gather(1, targets.reshape(-1, 1))
    rank = (probs > of_target).sum(1)
    text = [tokenizer.decode(i) if i != data.end_of_text_id else "" for i in targets.reshape(-1).tolist()]

    result = evaluate(player_folder, data_folder, device="cpu")
    cross_entropy = functional.cross_entropy(logits, targets.reshape(-1)).item()
    assert result["cross_entropy"] == pytest.approx(cross_entropy, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(cross_entropy), rel=1e-4)
    assert result["entropy"] == pytest.approx(-(probs * probs.log()).sum(1).mean().item(), rel=1e-5)
    assert result["top1_accuracy"] == pytest.approx((rank == 0).double().mean().item())
    assert result["top1_accuracy"] == pytest.approx((logits.argmax(1) == targets.reshape(-1)).double().mean().item())
    assert result["top16_accuracy"] == pytest.approx((rank < 16).double().mean().item())
    assert result["top1_accuracy"] < result["top16_accuracy"] < 1
    assert result["bytes"] == sum(len(piece.encode("utf-8")) for piece in text)
    bits = cross_entropy * targets.numel() / math.log(2)
    assert result["bits_per_byte"] == pytest.approx(bits / result["bytes"], rel=1e-5)
    assert sum(row["count"] * row["confidence"] for row in result["reliability"]) / result["tokens"] == pytest.approx(
        probs.amax(1).mean().item(), rel=1e-5
    )
    assert (result["tokens"], result["windows"], result["block_size"]) == (targets.numel(), len(windows), BLOCK)
    assert result["split"] == "valid"
    assert "rewards" not in result


@pytest.mark.parametrize("kind", ["SentencePiece", "WordPiece", "NFC", "unnamed end", "end not special"])
def test_bits_per_byte_are_of_the_text_whatever_the_tokenizer(kind: str, tmp_path: Path):
    """Three texts and their ends; the first token is only read."""
    text = "to\nthe river  to cafe\u0301 龍, light of the door"
    (tmp_path / "texts.jsonl").write_text((json.dumps({"text": text}) + "\n") * 30)
    save_tokenizer(kind, tmp_path / "tokenizer")
    spec = str(tmp_path / "tokenizer")
    prepare([str(tmp_path / "texts.jsonl")], tmp_path / "data", tokenizer=spec, valid_fraction=0.5, quiet=True)
    data = PreparedData.open(tmp_path / "data")
    tokens = len(data.valid) // data.manifest["documents"]["valid"]  # of each document
    player = save_model(tmp_path / "player", data.load_tokenizer(), seed=5, factor=15)

    result = evaluate(player, tmp_path / "data", block_size=1, max_windows=3 * tokens - 1, device="cpu")
    first = data.load_tokenizer().decode(data.valid.slice(0, 1)).strip()
    assert text.startswith(first)
    # A mark put before a text takes the place of its first character.
    assert result["bytes"] == pytest.approx(3 * len(text.encode("utf-8")) - len(first), abs=1)
    bits = result["cross_entropy"] * (3 * tokens - 1) / math.log(2)
    assert result["bits_per_byte"] == pytest.approx(bits / result["bytes"])
    assert "bits_per_byte_missing" not in result


def test_bits_per_byte_that_an_older_folder_cannot_have_say_why(tmp_path: Path):
    source = write_documents(tmp_path / "texts.jsonl", count=30, seed=2)
    spec = save_tokenizer("SentencePiece", tmp_path / "tokenizer")
    prepare([str(source)], tmp_path / "data", tokenizer=spec, quiet=True)
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    manifest["files"] = {name: record for name, record in manifest["files"].items() if not name.startswith("bytes-")}
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    player = save_model(tmp_path / "player", PreparedData.open(tmp_path / "data").load_tokenizer(), seed=5, factor=15)
    result = evaluate(player, tmp_path / "data", device="cpu")
    assert (result["bytes"], result["bits_per_byte"]) == (None, None)
    assert result["bits_per_byte_missing"].endswith("before the bytes of such tokens were kept; prepare it anew")


def test_more_than_one_batch_of_windows_counts_each_once(data_folder: Path, player_folder: Path):
    windows = windows_of(PreparedData.open(data_folder), "train")[:19]
    expected = functional.cross_entropy(
        logits_of(player_folder, windows[:, :-1]).flatten(0, 1), windows[:, 1:].reshape(-1)
    )
    result = evaluate(player_folder, data_folder, split="train", max_windows=19, device="cpu")
    assert (result["windows"], result["tokens"], result["split"]) == (19, 19 * BLOCK, "train")
    assert result["cross_entropy"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_shorter_block_cuts_other_windows(data_folder: Path, player_folder: Path):
    windows = windows_of(PreparedData.open(data_folder), block_size=5)
    expected = functional.cross_entropy(
        logits_of(player_folder, windows[:, :-1]).flatten(0, 1), windows[:, 1:].reshape(-1)
    )
    result = evaluate(player_folder, data_folder, block_size=5, device="cpu")
    assert (result["windows"], result["block_size"]) == (len(windows), 5)
    assert result["cross_entropy"] == pytest.approx(expected.item(), rel=1e-5)
    assert result["cross_entropy"] != evaluate(player_folder, data_folder, device="cpu")["cross_entropy"]


def test_more_windows_than_there_are_means_all(data_folder: Path, player_folder: Path):
    every = evaluate(player_folder, data_folder, device="cpu")
    assert evaluate(player_folder, data_folder, max_windows=10**6, device="cpu") == every


def test_a_run_folder_stands_for_its_best_player(tiny_config, tmp_path: Path, data_folder: Path):
    config = tiny_config(tmp_path, objective="cross_entropy", steps=6, eval_every_steps=2, eval_windows=None)
    summary = train(config, quiet=True)
    of_run = evaluate(config.out, data_folder, device="cpu")
    assert of_run == evaluate(tmp_path / "run" / "player", data_folder, device="cpu")
    assert of_run["cross_entropy"] == pytest.approx(summary["best_cross_entropy"], rel=1e-5)


def test_rows_of_a_padded_head_take_no_part(tmp_path: Path, data_folder: Path, player_folder: Path, tokenizer):
    padded = AutoModelForCausalLM.from_pretrained(player_folder)
    padded.resize_token_embeddings(len(tokenizer) + 9)
    with torch.no_grad():
        padded.get_output_embeddings().weight[len(tokenizer) :] = 100.0
    padded.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    plain = evaluate(player_folder, data_folder, device="cpu")
    tables = {name: plain[name] for name in TABLES}
    assert evaluate(tmp_path / "padded", data_folder, device="cpu") == without_rounding(plain) | tables


def test_a_cached_critic_answers_too(data_folder, player_folder, critic_folder, critic_cache):
    live, cached = (
        evaluate(player_folder, data_folder, critic=str(critic), avatarl=REWARDS)
        for critic in (critic_folder, critic_cache)
    )
    assert cached["rewards"].pop("estimated_share") == 0
    assert cached["rewards"] == pytest.approx(live["rewards"], rel=2e-3)
    with pytest.raises(UserError, match="a cache of windows of 16 tokens; expected block_size, 8"):
        evaluate(player_folder, data_folder, critic=str(critic_cache), block_size=8)


def test_the_cache_of_a_part_of_the_text_answers_for_its_validation(
    data_folder, player_folder, critic_folder, critic_cache, tmp_path: Path
):
    """Which is whole in it, whatever part of the training split it is of."""
    options = dict(block_size=16, bytes_per_token=6 + 4 * 300, train_windows=24, precision="fp32", quiet=True)
    cache_critic(str(critic_folder), data_folder, tmp_path / "part", **options)
    part, whole = (
        evaluate(player_folder, data_folder, critic=str(cache), avatarl=REWARDS)
        for cache in (tmp_path / "part", critic_cache)
    )
    assert part == whole
    with pytest.raises(UserError, match="covers 24 train and .* valid windows; expected"):
        evaluate(player_folder, data_folder, critic=str(tmp_path / "part"), split="train")
    manifest = json.loads((tmp_path / "part" / "cache.json").read_text())
    manifest["windows"]["valid"] -= 1
    (tmp_path / "part" / "cache.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="valid windows; expected"):
        evaluate(player_folder, data_folder, critic=str(tmp_path / "part"))


def test_a_sampled_tail_is_the_same_each_time(data_folder, player_folder, critic_folder):
    tail = AvataRLConfig(top_k=4, pool="arithmetic", threshold="none", tail="sample")
    first, second = (evaluate(player_folder, data_folder, critic=str(critic_folder), avatarl=tail) for _ in range(2))
    assert first["rewards"] == second["rewards"]


# --- rewards --------------------------------------------------------------------------------------------------------


def expected_rewards(data_folder: Path, player: Path, critics: list[Path], config: AvataRLConfig) -> dict[str, float]:
    windows = windows_of(PreparedData.open(data_folder))
    inputs, targets = windows[:, :-1], windows[:, 1:]
    judged = [logits_of(critic, inputs).float() for critic in critics]
    _, metrics = avatarl_loss(logits_of(player, inputs).float(), judged, targets, config)
    return {name: value.item() for name, value in metrics.items()}


def test_rewards_are_those_of_the_loss_from_logits(data_folder: Path, player_folder: Path, critic_folder: Path):
    expected = expected_rewards(data_folder, player_folder, [critic_folder], REWARDS)
    result = evaluate(player_folder, data_folder, critic=str(critic_folder), avatarl=REWARDS, device="cpu")
    assert result["rewards"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert result["rewards"]["loss"] != pytest.approx(result["cross_entropy"], rel=1e-3)
    alone = evaluate(player_folder, data_folder, device="cpu")
    assert {name: value for name, value in result.items() if not name.startswith("reward")} == alone
    assert result["reward_settings"]["top_k"] == REWARDS.top_k


def test_rewards_are_the_articles_unless_settings_are_given(
    data_folder: Path, player_folder: Path, critic_folder: Path
):
    expected = expected_rewards(data_folder, player_folder, [critic_folder], AvataRLConfig.article())
    result = evaluate(player_folder, data_folder, critic=str(critic_folder), device="cpu")
    assert result["rewards"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert result["rewards"] != pytest.approx(
        expected_rewards(data_folder, player_folder, [critic_folder], REWARDS), rel=1e-2
    )


def test_several_critics_judge_together(
    data_folder: Path, player_folder: Path, critic_folder: Path, second_critic: Path
):
    config = AvataRLConfig(top_k=3, critic_weight=(0.4, 0.1), threshold="none")
    critics = [critic_folder, second_critic]
    expected = expected_rewards(data_folder, player_folder, critics, config)
    names = [str(critic) for critic in critics]
    result = evaluate(player_folder, data_folder, critic=names, avatarl=config, device="cpu")
    assert result["rewards"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    swapped = evaluate(player_folder, data_folder, critic=names[::-1], avatarl=config, device="cpu")
    assert swapped["rewards"]["loss"] != pytest.approx(result["rewards"]["loss"], rel=1e-3)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer was trained on other words."""
    folder = tmp_path_factory.mktemp("other")
    source = write_documents(folder / "other.jsonl", count=30, seed=9)
    source.write_text(source.read_text().replace("owl", "zebra"))
    prepare([str(source)], folder / "data", tokenizer="bpe:290", quiet=True)
    tokenizer = PreparedData.open(folder / "data").load_tokenizer()
    build_player(TINY_PLAYER, tokenizer, BLOCK, seed=1).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def test_a_model_or_critic_with_another_vocabulary_is_refused(
    data_folder: Path, player_folder: Path, other_model: Path
):
    with pytest.raises(UserError, match=f"model {other_model} has another vocabulary"):
        evaluate(other_model, data_folder, device="cpu")
    with pytest.raises(UserError, match=f"critic {other_model} has another vocabulary"):
        evaluate(player_folder, data_folder, critic=str(other_model), device="cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "test"}, "split is 'test'; expected one of 'train', 'valid'"),
        ({"block_size": 0}, "block_size is 0; expected a whole number of at least 1"),
        ({"block_size": BLOCK + 1}, f"block_size is {BLOCK + 1}; expected at most {BLOCK}"),
        ({"max_windows": 0}, "max_windows is 0; expected a whole number of at least 1"),
        ({"max_windows": -2}, "max_windows is -2"),
        ({"device": "abacus"}, "device is 'abacus'"),
    ],
)
def test_values_out_of_range_are_named(data_folder: Path, player_folder: Path, settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        evaluate(player_folder, data_folder, **{"device": "cpu", **settings})


def test_settings_of_the_rewards_that_do_not_fit_are_refused(
    data_folder: Path, player_folder: Path, critic_folder: Path
):
    with pytest.raises(UserError, match="top_k is 5000; expected at most the vocabulary's"):
        evaluate(player_folder, data_folder, critic=str(critic_folder), avatarl=AvataRLConfig(top_k=5000))
    with pytest.raises(UserError, match="critic_weight has 2 entries for 1 critics"):
        weights = AvataRLConfig(top_k=2, critic_weight=(0.1, 0.2))
        evaluate(player_folder, data_folder, critic=str(critic_folder), avatarl=weights)


def test_a_critic_with_a_shorter_context_is_refused(tmp_path: Path, data_folder: Path, player_folder: Path, tokenizer):
    build_player(TINY_PLAYER, tokenizer, BLOCK // 2, seed=1).save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    with pytest.raises(UserError, match=f"short reads at most {BLOCK // 2} tokens; expected at least block_size"):
        evaluate(player_folder, data_folder, critic=str(tmp_path / "short"), device="cpu")


@pytest.mark.parametrize(
    "pass_with_nan, message", [(1, "its logits are NaN at 1 of"), (2, "critic .*: logits are NaN in the 2 windows")]
)
def test_nan_is_refused(pass_with_nan, message, data_folder, player_folder, critic_folder, monkeypatch):
    """No comparison with NaN is true: no token would be likelier than the target, no bin hold the position."""
    real, passes = critics.last_hidden, []

    def last_hidden(model, inputs):
        passes.append(model)
        hidden = real(model, inputs).clone()
        hidden[0, 3, 0] += torch.nan if len(passes) == pass_with_nan else 0
        return hidden

    for module in (likelihood, critics):
        monkeypatch.setattr(module, "last_hidden", last_hidden)
    with pytest.raises(UserError, match=message):
        evaluate(player_folder, data_folder, critic=str(critic_folder), device="cpu", max_windows=2)


def test_data_that_is_too_short_or_no_data_is_refused(tmp_path: Path, player_folder: Path, data_folder: Path):
    source = tmp_path / "short.txt"
    source.write_text("old oak")
    tokenizer = str(data_folder / "tokenizer")
    prepare([str(source)], tmp_path / "short", tokenizer=tokenizer, quiet=True)
    with pytest.raises(UserError, match=f"block_size: {BLOCK} needs at least {BLOCK + 1} tokens"):
        evaluate(player_folder, tmp_path / "short", device="cpu")
    with pytest.raises(UserError, match="manifest.json: no such file"):
        evaluate(player_folder, tmp_path, device="cpu")
    shutil.copytree(data_folder, tmp_path / "copy")
    (tmp_path / "copy" / "valid-00000.bin").write_bytes(b"")
    with pytest.raises(UserError, match="valid-00000.bin: has 0 bytes"):
        evaluate(player_folder, tmp_path / "copy", device="cpu")


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_puts_together_what_is_asked_for(tmp_path: Path, data_folder: Path, player_folder: Path, capsys):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"good": "old oak", "bad": "oak old"}\n{"good": "wise owl", "bad": "wise oak"}\n')
    model = ["evaluate", str(player_folder), "--device", "cpu"]
    on_pairs = {"minimal_pairs": score_pairs(player_folder, read_pairs(pairs), device="cpu")}
    assert main([*model, "--pairs", str(pairs)]) == 0
    assert json.loads(capsys.readouterr().out) == on_pairs
    assert main([*model, "--pairs", str(pairs), "--data", str(data_folder), "--split", "train"]) == 0
    on_text = evaluate(player_folder, data_folder, split="train", device="cpu")
    assert json.loads(capsys.readouterr().out) == on_text | on_pairs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to evaluate on; expected data (a prepared folder), pairs (.jsonl) or tasks (by name)"),
        (["--pairs", "p", "--critic", "c"], "critic is ['c'], which is an option of data; expected data too"),
        (["--pairs", "p", "--max_windows", "3"], "max_windows is 3, which is an option of data; expected data too"),
        (["--tasks", "t", "--split", "train"], "split is 'train', which is an option of data; expected data too"),
        (
            ["--data", "d", "--include_path", "i"],
            "include_path is 'i', which is an option of tasks; expected tasks too",
        ),
        (
            ["--data", "d", "--pairs", "nowhere"],
            "pairs 'nowhere': no such file or folder; expected a .jsonl file, or a folder of them",
        ),
    ],
)
def test_a_command_that_cannot_be_put_together_is_refused(options: list[str], message: str, capsys):
    assert main(["evaluate", "model", *options]) == 2
    assert capsys.readouterr().err == f"avatarl: {message}\n"
