"""The loop: the same for every objective, and what it leaves."""

from __future__ import annotations

import errno
import json
import math
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from avatarl import AvataRLConfig, UserError
from avatarl.data import PreparedData, Windows
from avatarl.errors import RunFailed
from avatarl.models import PlayerConfig, build_player
from avatarl.objective import OBJECTIVES
from avatarl.training import OptimConfig, TrainConfig, train
from avatarl.training.loop import seed_dropout
from avatarl.training.model import PlayerWithLoss
from avatarl.training.validation import Validation

from ..conftest import BLOCK
from .runs import SPENT, Interrupted, contents_of, lines_of, weights_of, with_dropout
from .test_config import read_config

MODEL_FILES = {
    "README.md",
    "config.json",
    "curve.svg",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
CHECKPOINT_FILES = {"player.safetensors", "optimiser.safetensors", "state.json", "manifest.json"}
SIZES = {"parameters", "non_embedding_parameters", "unique_tokens", *SPENT, "cached_critic_flops"}  # in the record


@pytest.fixture
def record_inputs(monkeypatch) -> list[Tensor]:
    """What training passes to the wrapped module, micro-batch by micro-batch."""
    recorded: list[Tensor] = []
    real = PlayerWithLoss.forward

    def forward(self: PlayerWithLoss, input_ids: Tensor, *arguments, **named):
        if self.training:
            recorded.append(input_ids.clone())
        return real(self, input_ids, *arguments, **named)

    monkeypatch.setattr(PlayerWithLoss, "forward", forward)
    return recorded


# --- a run and its folder -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_every_objective_trains_and_leaves_a_whole_run_folder(tiny_config, tmp_path: Path, objective: str):
    config = tiny_config(tmp_path, objective=objective, tensorboard=True)
    summary = train(config, quiet=True)
    run = tmp_path / "run"
    files = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    events = {name for name in files if name.startswith("tensorboard/events.out.tfevents")}
    checkpoint = CHECKPOINT_FILES | ({"snapshot.safetensors"} if objective == "ppo" else set())
    assert len(events) == 1
    assert files - events == (
        {"config.yaml", "environment.json", "metrics.jsonl"}
        | {f"checkpoints/step-{step:08d}/{name}" for step in (4, 8) for name in checkpoint}
        | {f"{folder}/{name}" for folder in ("player", "final") for name in MODEL_FILES}
    )
    assert [(line["event"], line["step"]) for line in lines_of(run)] == [
        ("train", 2),
        ("train", 4),
        ("eval", 4),
        ("train", 6),
        ("train", 8),
        ("eval", 8),
    ]
    assert all(math.isfinite(value) for line in lines_of(run) for name, value in line.items() if name != "event")
    assert (summary["steps"], summary["tokens"]) == (8, 8 * 4 * BLOCK)
    assert summary["best_cross_entropy"] == min(x["cross_entropy"] for x in lines_of(run) if x["event"] == "eval")
    assert (summary["critic_flops"] > 0) == (OBJECTIVES[objective].needs_critic(config.avatarl, config.baseline))
    for line in lines_of(run):
        assert tuple(line)[2:5] == SPENT and all(type(line[name]) is int for name in SPENT)
        assert [8 * line[name] for name in SPENT] == [line["step"] * summary[name] for name in SPENT]
    before = build_player(config.player, AutoTokenizer.from_pretrained(run / "final"), BLOCK, config.seed)
    trained = weights_of(run / "final")
    assert all(not torch.equal(value, trained[name]) for name, value in before.named_parameters())


def test_the_folder_says_what_was_run(tiny_config, tmp_path: Path, data_folder: Path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")  # of a package that calls itself 2.13.0
    config = tiny_config(tmp_path)
    summary = train(config, quiet=True)
    assert read_config(tmp_path / "run" / "config.yaml") == config
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["data_digest"] == PreparedData.open(data_folder).digest
    assert environment["precision"] == "fp32" and environment["versions"]["torch"] == "2.13.0+cu130"
    assert environment["sizes"] == {name: summary[name] for name in SIZES}


def test_a_quiet_run_prints_nothing_and_another_only_to_stderr(tiny_config, tmp_path: Path, capfd):
    train(tiny_config(tmp_path / "quiet"), quiet=True)
    assert capfd.readouterr() == ("", "")
    train(tiny_config(tmp_path / "loud"))
    out, err = capfd.readouterr()
    assert out == "" and "step 8: validation cross-entropy" in err


def test_a_finished_player_opens_as_an_ordinary_model(tiny_config, tmp_path: Path, tokenizer):
    config = tiny_config(tmp_path)
    summary = train(config, quiet=True)
    run = tmp_path / "run"
    opened = AutoModelForCausalLM.from_pretrained(run / "player", dtype=torch.float32).eval()
    assert AutoTokenizer.from_pretrained(run / "player").get_vocab() == tokenizer.get_vocab()
    assert opened.config.use_cache

    best = build_player(config.player, tokenizer, BLOCK, seed=99).eval()
    checkpoint = run / "checkpoints" / f"step-{summary['best_step']:08d}"
    best.load_state_dict(load_file(checkpoint / "player.safetensors"), strict=False)
    ids = torch.arange(BLOCK).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(opened(input_ids=ids).logits, best(input_ids=ids).logits)
        generated = opened.generate(ids[:, :4], max_new_tokens=4, do_sample=False)
    assert generated.shape[1] > 4


def test_the_best_player_is_chosen_by_validation_cross_entropy(tiny_config, tmp_path: Path, monkeypatch):
    real, pretended = Validation.evaluate, iter([3.0, 2.0, 2.5])
    monkeypatch.setattr(Validation, "evaluate", lambda *args: {**real(*args), "cross_entropy": next(pretended)})
    config = tiny_config(tmp_path, steps=6, eval_every_steps=2, checkpoint_every_steps=2, keep_last=9)
    summary = train(config, quiet=True)
    run = tmp_path / "run"
    assert (summary["best_step"], summary["best_cross_entropy"]) == (4, 2.0)
    for folder, step in (("player", 4), ("final", 6)):
        saved = load_file(run / "checkpoints" / f"step-{step:08d}" / "player.safetensors")
        embedding = weights_of(run / folder)["model.embed_tokens.weight"]
        assert any(torch.equal(embedding, value) for value in saved.values())
    assert f"2.0000 nats per token at step 4 |\n| training tokens at that step | {4 * 4 * BLOCK}" in (
        run / "player" / "README.md"
    ).read_text(encoding="utf-8")
    assert "2.5000 nats per token at step 6 |" in (run / "final" / "README.md").read_text(encoding="utf-8")


def test_a_card_names_the_critic_only_where_it_judged(tiny_config, tmp_path: Path, critic_folder: Path):
    train(tiny_config(tmp_path / "a", steps=1), quiet=True)
    train(tiny_config(tmp_path / "b", steps=1, objective="cross_entropy"), quiet=True)
    assert f"| critic | `{critic_folder}` |" in (tmp_path / "a" / "run" / "final" / "README.md").read_text()
    assert "| critic | none |" in (tmp_path / "b" / "run" / "final" / "README.md").read_text()


def test_tensorboard_has_every_number_of_the_metrics(tiny_config, tmp_path: Path):
    train(tiny_config(tmp_path, tensorboard=True), quiet=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    lines = lines_of(tmp_path / "run")
    for event in ("train", "eval"):
        for name in set(lines[-1 if event == "eval" else 0]) - {"event", "step"}:
            written = [(scalar.step, scalar.value) for scalar in events.Scalars(f"{event}/{name}")]
            expected = [(line["step"], line[name]) for line in lines if line["event"] == event]
            assert written == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]


def test_a_full_tensorboard_folder_ends_the_run_in_one_line(tiny_config, tmp_path: Path, monkeypatch):
    """Its thread fails; the run says so at its next checkpoint, and nothing prints the thread's traceback."""
    printed = []
    monkeypatch.setattr(threading, "excepthook", printed.append)

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", full)
    with pytest.raises(RunFailed, match="cannot be written or read .*No space left on device"):
        train(tiny_config(tmp_path, tensorboard=True), quiet=True)
    assert not printed


def test_tensorboard_of_a_resumed_run_has_every_step_once(tiny_config, tmp_path: Path, interrupt):
    interrupt(8)
    with pytest.raises(Interrupted):
        train(tiny_config(tmp_path, tensorboard=True, log_every_steps=1), quiet=True)
    time.sleep(1.1)  # event files are read in the order of their names, which hold the second
    train(tiny_config(tmp_path, tensorboard=True, log_every_steps=1), resume=True, quiet=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [scalar.step for scalar in events.Scalars("train/loss")] == list(range(1, 9))


def test_validation_is_the_mean_over_its_windows_without_dropout(tiny_config, tmp_path: Path, data_folder: Path):
    config = tiny_config(tmp_path, objective="cross_entropy", player=with_dropout(), eval_windows=None, steps=5)
    train(config, quiet=True)
    windows = Windows(PreparedData.open(data_folder).valid, BLOCK)
    assert len(windows) % config.micro_batch_size  # the last batch is a smaller one
    inputs, targets = windows.batch(range(len(windows)))
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(final(input_ids=inputs).logits.flatten(0, 1), targets.flatten())
    assert lines_of(tmp_path / "run")[-1]["cross_entropy"] == pytest.approx(expected.item(), rel=1e-5)


# --- what is learned, from what -------------------------------------------------------------------------------------


def test_the_loss_falls_on_a_text_that_can_be_learned(tiny_config, tmp_path: Path):
    """The documents are pairs out of eight: by heart about ln 8 nats a pair, at random ln 300 a token."""
    config = tiny_config(tmp_path, objective="cross_entropy", steps=60, eval_every_steps=60, log_every_steps=1)
    train(config, quiet=True)
    lines = lines_of(tmp_path / "run")
    assert lines[0]["cross_entropy"] == pytest.approx(math.log(300), abs=0.3)
    assert lines[-1]["event"] == "eval" and lines[-1]["cross_entropy"] < 3.0


def test_every_objective_sees_the_same_data_from_the_same_weights(tiny_config, tmp_path, record_inputs, monkeypatch):
    initial: list[Tensor] = []
    real = PlayerWithLoss.__init__

    def remember(self, player, *arguments, **settings):
        initial.append(torch.cat([parameter.detach().flatten() for parameter in player.parameters()]))
        real(self, player, *arguments, **settings)

    monkeypatch.setattr(PlayerWithLoss, "__init__", remember)
    seen = {}
    for objective in sorted(OBJECTIVES):
        record_inputs.clear()
        train(tiny_config(tmp_path / objective, objective=objective, steps=3), quiet=True)
        seen[objective] = torch.stack(record_inputs)
    assert seen["avatarl"].shape == (3, 4, BLOCK)
    assert all(torch.equal(inputs, seen["avatarl"]) for inputs in seen.values())
    assert all(torch.equal(weights, initial[0]) for weights in initial)


def test_an_epoch_is_every_training_window_once(tiny_config, tmp_path: Path, data_folder: Path, record_inputs):
    windows = Windows(PreparedData.open(data_folder).train, BLOCK)
    config = tiny_config(tmp_path, objective="cross_entropy", steps=None, epochs=2.0, micro_batch_size=1)
    config = TrainConfig(**{**vars(config), "eval_every_steps": 1000, "checkpoint_every_steps": 1000})
    assert config.total_steps(len(windows)) == 2 * len(windows)
    train(config, quiet=True)
    seen = [tuple(inputs[0].tolist()) for inputs in record_inputs]
    everything = sorted(tuple(windows.batch([index])[0][0].tolist()) for index in range(len(windows)))
    first, second = seen[: len(windows)], seen[len(windows) :]
    assert sorted(first) == sorted(second) == everything
    assert first != second


def test_a_run_on_a_part_of_the_text_reads_nothing_else(tiny_config, tmp_path: Path, data_folder: Path, record_inputs):
    part = Windows(PreparedData.open(data_folder).train, BLOCK, count=8)
    train(tiny_config(tmp_path, train_windows=8, steps=None, epochs=3, eval_every_steps=1000), quiet=True)
    seen = sorted(tuple(row.tolist()) for batch in record_inputs[:6] for row in batch)
    assert seen == sorted(3 * [tuple(row.tolist()) for row in part.batch(range(8))[0]])
    record = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert record["sizes"]["unique_tokens"] == 8 * BLOCK
    assert f"| {8 * BLOCK} of " in (tmp_path / "run" / "player" / "README.md").read_text()


def test_another_seed_gives_other_data_and_weights(tiny_config, tmp_path: Path, record_inputs):
    for seed in (1, 2):
        train(tiny_config(tmp_path / str(seed), seed=seed, steps=1), quiet=True)
    assert not torch.equal(record_inputs[0], record_inputs[1])


@pytest.mark.parametrize("objective", ["avatarl", "cross_entropy", "reinforce"])
def test_one_batch_of_eight_is_eight_batches_of_one(tiny_config, tmp_path: Path, objective: str):
    weights = []
    for batch, accumulate in ((8, 1), (1, 8), (2, 4)):
        folder = tmp_path / f"{batch}x{accumulate}"
        config = tiny_config(
            folder, objective=objective, micro_batch_size=batch, gradient_accumulation_steps=accumulate, steps=4
        )
        train(config, quiet=True)
        weights.append(weights_of(folder / "run" / "final"))
        if len(weights) > 1:
            for ours, reference in zip(lines_of(folder / "run"), lines_of(tmp_path / "8x1" / "run"), strict=True):
                assert ours == {
                    **ours,
                    **{name: pytest.approx(reference[name], rel=1e-4, abs=1e-5) for name in NUMBERS},
                }
    for other in weights[1:]:
        for name, value in weights[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-4)  # steps are 1e-2 long


NUMBERS = ("step", "tokens", "loss", "cross_entropy", "entropy")


def test_bf16_on_the_cpu_stays_near_fp32(tiny_config, tmp_path: Path):
    final = {}
    for precision in ("fp32", "bf16"):
        train(tiny_config(tmp_path / precision, precision=precision), quiet=True)
        final[precision] = lines_of(tmp_path / precision / "run")[-1]
        assert weights_of(tmp_path / precision / "run" / "final")["model.norm.weight"].dtype == torch.float32
    assert final["bf16"]["cross_entropy"] != final["fp32"]["cross_entropy"]
    assert final["bf16"]["cross_entropy"] == pytest.approx(final["fp32"]["cross_entropy"], rel=0.02)


def test_muon_trains(tiny_config, tmp_path: Path):
    config = tiny_config(tmp_path, objective="cross_entropy", steps=30, eval_every_steps=30)
    train(TrainConfig(**{**vars(config), "optim": OptimConfig(name="muon", learning_rate=1e-2)}), quiet=True)
    assert lines_of(tmp_path / "run")[-1]["cross_entropy"] < 4.5


# --- a user's mistakes ----------------------------------------------------------------------------------------------


def test_a_folder_that_holds_files_is_refused_and_untouched(tiny_config, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("two years of work")
    before = contents_of(tmp_path / "run")
    with pytest.raises(UserError, match="already holds files"):
        train(tiny_config(tmp_path), quiet=True)
    with pytest.raises(UserError, match="holds files but no config.yaml"):
        train(tiny_config(tmp_path), resume=True, quiet=True)
    assert contents_of(tmp_path / "run") == before


def test_an_empty_folder_is_accepted(tiny_config, tmp_path: Path):
    (tmp_path / "run").mkdir()
    assert train(tiny_config(tmp_path, steps=1), quiet=True)["steps"] == 1


def test_out_that_is_a_file_or_lies_in_one_is_refused(tiny_config, tmp_path: Path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match="out is .*which is a file"):
        train(tiny_config(tmp_path), quiet=True)
    with pytest.raises(UserError, match="out is .*cannot be made"):
        train(TrainConfig(**{**vars(tiny_config(tmp_path)), "out": str(tmp_path / "run" / "inner")}), quiet=True)


def test_data_too_short_for_a_window_is_refused(tiny_config, tmp_path: Path, data_folder: Path):
    data = PreparedData.open(data_folder)
    assert len(data.valid) < len(data.train)
    for block_size in (len(data.valid), len(data.train) + 1):  # validation alone is too short; everything is
        with pytest.raises(UserError, match=f"block_size: {block_size} needs at least {block_size + 1} tokens"):
            train(tiny_config(tmp_path, block_size=block_size), quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"critic": None}, "objective 'avatarl' needs a critic"),
        ({"critic": "no/such/folder"}, "no/such/folder"),
        ({"data": "no/such/folder"}, "no/such/folder"),
        ({"device": "abacus"}, "device is 'abacus'.*expected auto, cpu or cuda"),
        ({"avatarl": AvataRLConfig(top_k=1000)}, "top_k is 1000"),
        ({"avatarl": AvataRLConfig(critic_weight=(0.1, 0.2))}, "critic_weight has 2 entries for 1 critics"),
        ({"player": PlayerConfig(settings={"widht": 3})}, "'widht'"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_written(tiny_config, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        train(tiny_config(tmp_path, **overrides), quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_critic_that_no_reward_needs_is_not_opened(tiny_config, tmp_path: Path):
    alone = AvataRLConfig(reality_weight=1.0, critic_weight=0.0)
    for objective in ("cross_entropy", "avatarl"):
        config = tiny_config(tmp_path / objective, objective=objective, critic="no/such/folder", avatarl=alone, steps=1)
        assert train(config, quiet=True)["critic_flops"] == 0


def test_the_player_of_a_run_is_a_critic_for_the_next(tiny_config, tmp_path: Path):
    train(tiny_config(tmp_path / "a", objective="cross_entropy", steps=1), quiet=True)
    summary = train(tiny_config(tmp_path / "b", critic=[str(tmp_path / "a" / "run")] * 2, steps=1), quiet=True)
    one = train(tiny_config(tmp_path / "c", critic=str(tmp_path / "a" / "run"), steps=1), quiet=True)
    assert summary["critic_flops"] == 2 * one["critic_flops"]
    assert one["player_flops"] == 3 * one["critic_flops"]  # the same shape, forward alone


# --- what one step depends on ---------------------------------------------------------------------------------------


def test_a_line_of_metrics_averages_all_its_steps_whenever_checkpoints_are_written(tiny_config, tmp_path: Path):
    """Sums since the last line are in the checkpoint, and go on from there."""
    for every in (1, 3, 100):
        settings = dict(objective="cross_entropy", checkpoint_every_steps=every, log_every_steps=4)
        train(tiny_config(tmp_path / str(every), **settings), quiet=True)
    expected = lines_of(tmp_path / "100" / "run")
    for every in (1, 3):
        for found, line in zip(lines_of(tmp_path / str(every) / "run"), expected, strict=True):
            assert found.pop("event") == line["event"]
            assert found == pytest.approx({name: line[name] for name in found}, rel=1e-6)


def test_dropout_depends_on_seed_step_and_process_and_on_nothing_else():
    def drawn(seed: int, step: int, rank: int) -> tuple[float, ...]:
        seed_dropout(seed, step, rank)
        return tuple(torch.rand(3).tolist())

    keys = [(seed, step, rank) for seed in (1, 2) for step in (1, 2) for rank in (0, 1)]
    draws = [drawn(*key) for key in keys]
    assert len(set(draws)) == len(keys)
    assert [drawn(*key) for key in reversed(keys)] == draws[::-1]
