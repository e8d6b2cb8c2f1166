"""Trainer takes the steps of the native loop, and says of them what the native loop says."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import Subset
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from avatarl import AvataRLConfig, UserError, linear_avatarl_loss
from avatarl.data import PreparedData, Windows
from avatarl.integrations.transformers import AvataRLTrainer, PreparedWindows
from avatarl.models import CriticCache, PlayerConfig, build_player, load_critic
from avatarl.models.loading import head_weight, last_hidden
from avatarl.objective import OBJECTIVES, BaselineConfig, make_objective
from avatarl.results import evaluate
from avatarl.training import train

from ..conftest import BLOCK, TINY, TINY_PLAYER
from ..training.runs import weights_of, with_dropout
from .conftest import Rows, eval_lines, native_lines, train_lines, trainer_of

EXACT = sorted(name for name, kind in OBJECTIVES.items() if not kind.is_sampled)
CASES: dict[str, dict] = {
    **{name: dict(objective=name) for name in EXACT},
    "bf16": dict(precision="bf16"),  # a rounding of the gradient's norm may become one of a product
    "padded vocabulary": dict(player=PlayerConfig(settings={**TINY, "vocab_size": 304})),
    "cached critic": {},
    "two critics": dict(avatarl=AvataRLConfig(top_k=4, critic_weight=(0.2, 0.1))),
}


def assert_same_weights(trainer: AvataRLTrainer, expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in trainer.model.named_parameters():
        torch.testing.assert_close(value.detach(), expected[name], rtol=0, atol=tolerance, msg=name)


# --- the native loop ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_trainer_takes_the_steps_of_the_native_loop(tiny_config, tmp_path: Path, cache: CriticCache, case: str):
    config = tiny_config(
        tmp_path, gradient_accumulation_steps=2, log_every_steps=1, eval_every_steps=4, eval_windows=None, **CASES[case]
    )
    parts = {}
    if case == "two critics":
        config = dataclasses.replace(config, critic=[config.critic, "random:1m:3"])
    if case == "cached critic":
        config, parts = dataclasses.replace(config, critic=str(cache.path)), {"critics": cache}
    rel = 1e-3 if case == "bf16" else 1e-5
    train(config, quiet=True)
    trainer = trainer_of(config, tmp_path / "trainer", {"eval_strategy": "steps", "eval_steps": 4}, **parts)
    trainer.train()

    ours, theirs = train_lines(trainer), native_lines(tmp_path / "run", "train")
    assert len(ours) == 8
    for left, right in zip(ours, theirs, strict=True):
        assert left == pytest.approx(right, rel=rel)
    ours, theirs = eval_lines(trainer), native_lines(tmp_path / "run", "eval")
    assert len(ours) == 2
    for left, right in zip(ours, theirs, strict=True):
        assert {name: left[name] for name in right} == pytest.approx(right, rel=rel)
    assert_same_weights(trainer, weights_of(tmp_path / "run" / "final"), tolerance=1e-3 if case == "bf16" else 1e-6)


def test_evaluation_is_that_of_avatarl_evaluate(make_trainer, tmp_path: Path, data_folder: Path, critic_folder: Path):
    trainer = make_trainer({"per_device_eval_batch_size": 5})
    trainer.train()
    found = trainer.evaluate()
    trainer.save_model(tmp_path / "player")
    settings = AvataRLConfig(top_k=4, threshold="none")
    expected = evaluate(tmp_path / "player", data_folder, critic=str(critic_folder), avatarl=settings, block_size=BLOCK)
    assert expected["windows"] % 5
    assert {name: found[f"eval_{name}"] for name in expected["rewards"]} == pytest.approx(expected["rewards"], rel=1e-5)
    assert found["eval_cross_entropy"] == pytest.approx(expected["cross_entropy"], rel=1e-5)


# --- normalisation --------------------------------------------------------------------------------------------------


def test_micro_batches_change_nothing(make_trainer, rows: Rows):
    """Twelve rows as steps of eight and four, so that the last step has fewer micro-batches."""
    trainers = []
    for size, accumulated in ((8, 1), (4, 2), (2, 4)):
        settings = dict(per_device_train_batch_size=size, gradient_accumulation_steps=accumulated)
        # The gradient itself: AdamW would hide a factor.
        settings |= dict(optim="sgd", learning_rate=0.1, max_grad_norm=0, max_steps=-1, num_train_epochs=1)
        trainers.append(make_trainer(settings, train_dataset=rows, optimizers=(None, None)))
        trainers[-1].train()
    whole, *divided = trainers
    before = make_trainer().model
    assert all(
        not torch.equal(old, new) for old, new in zip(before.parameters(), whole.model.parameters(), strict=True)
    )
    for trainer in divided:
        assert trainer.state.global_step == 2
        assert_same_weights(trainer, dict(whole.model.named_parameters()), tolerance=1e-6)
        for left, right in zip(train_lines(trainer), train_lines(whole), strict=True):
            assert left == pytest.approx(right, rel=1e-5)


def test_a_step_without_any_label_changes_nothing(make_trainer, rows: Rows):
    rows.labels[:4] = -100
    settings = dict(optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_steps=2, logging_steps=2)
    both = make_trainer(settings, train_dataset=rows, optimizers=(None, None))
    settings |= dict(max_steps=1, logging_steps=1)
    second = make_trainer(settings, train_dataset=Subset(rows, range(4, 8)), optimizers=(None, None))
    both.train(), second.train()
    assert_same_weights(both, dict(second.model.named_parameters()), tolerance=0)
    (left,), (right,) = train_lines(both), train_lines(second)
    assert {**left, "step": 1} == pytest.approx(right, rel=1e-6)


def test_a_line_has_the_means_over_its_steps(make_trainer):
    each, every_second = make_trainer(), make_trainer({"logging_steps": 2})
    each.train(), every_second.train()
    found, expected = train_lines(every_second), train_lines(each)
    assert [line["step"] for line in found] == [2, 4]
    for name in make_objective("avatarl").metric_names([None]):
        means = [(first[name] + second[name]) / 2 for first, second in zip(expected[::2], expected[1::2], strict=True)]
        assert [line[name] for line in found] == pytest.approx(means, rel=1e-5)


@pytest.mark.parametrize("batch", [12, 5])
def test_an_evaluation_is_the_mean_over_positions(make_trainer, rows: Rows, critic_folder: Path, tokenizer, batch: int):
    trainer = make_trainer({"per_device_eval_batch_size": batch}, eval_dataset=rows)
    found = trainer.evaluate()
    critic, player = load_critic(critic_folder, tokenizer), trainer.model.eval()
    with torch.no_grad():
        loss, metrics = linear_avatarl_loss(
            last_hidden(player, rows.input_ids[:, :-1]),
            head_weight(player),
            last_hidden(critic, rows.input_ids[:, :-1]),
            head_weight(critic),
            rows.labels[:, 1:],
            AvataRLConfig(top_k=4, threshold="none"),
        )
    assert found["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, value in metrics.items():
        assert found[f"eval_{name}"] == pytest.approx(value.item(), rel=1e-5)


# --- critics --------------------------------------------------------------------------------------------------------


def test_a_critic_may_be_given_as_a_model_and_stays_as_it_is(make_trainer, tokenizer, tmp_path: Path):
    critic = build_player(with_dropout(), tokenizer, BLOCK, seed=77).train()
    critic.save_pretrained(tmp_path / "critic")
    tokenizer.save_pretrained(tmp_path / "critic")
    before = {name: value.clone() for name, value in critic.state_dict().items()}
    by_model, by_name = make_trainer(critics=critic), make_trainer(critics=tmp_path / "critic")
    by_model.train(), by_name.train()
    for left, right in zip(train_lines(by_model), train_lines(by_name), strict=True):
        assert left == pytest.approx(right, rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in critic.state_dict().items())
    assert not any(parameter.requires_grad for parameter in critic.parameters())


# --- what else Trainer brings ---------------------------------------------------------------------------------------


def test_an_attention_mask_reaches_player_and_critics(make_trainer, rows: Rows):
    """Padding on the left: wrong for whoever reads it."""

    class Padded(Rows):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            item = super().__getitem__(index)
            padding = torch.full((2,), 7)
            return {
                "input_ids": torch.cat([padding, item["input_ids"]]),
                "labels": torch.cat([torch.full((2,), -100), item["labels"]]),
                "attention_mask": torch.cat(
                    [torch.zeros(2, dtype=torch.long), torch.ones(len(item["labels"]), dtype=torch.long)]
                ),
            }

    short = Rows(rows.input_ids[:, :-2])
    expected = make_trainer(eval_dataset=short).evaluate()
    found = make_trainer(eval_dataset=Padded(rows.input_ids[:, :-2])).evaluate()
    for name in ("eval_loss", "eval_cross_entropy", "eval_expected_reward", "eval_critic_wins"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4)


def test_the_players_dropout_is_on_in_training_and_off_in_evaluation(make_trainer, tokenizer):
    losses, evaluations = [], []
    for config in (TINY_PLAYER, with_dropout()):
        player = build_player(config, tokenizer, BLOCK, seed=1)
        trainer = make_trainer({"max_steps": 1}, model=player, optimizers=(None, None))
        evaluations.append(trainer.evaluate()["eval_loss"])
        trainer.train()
        losses.append(train_lines(trainer)[0]["loss"])
    assert evaluations[0] == evaluations[1]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.1)


def test_a_loss_that_is_no_number_is_logged_as_none(make_trainer):
    trainer = make_trainer({"max_steps": 1})
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight[3].fill_(math.nan)
    trainer.train()
    assert math.isnan(train_lines(trainer)[0]["loss"])
    assert math.isnan(trainer.evaluate()["eval_loss"])


def test_draws_depend_on_the_place_in_the_run_alone(make_trainer, rows: Rows):
    trainers = []
    for settings in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        # The same row and the same player in every step.
        settings |= dict(optim="sgd", learning_rate=0.0)
        parts = dict(train_dataset=Subset(rows, [0] * 16), optimizers=(None, None))
        trainers.append(make_trainer(settings, objective="reinforce", baseline=BaselineConfig(samples=99), **parts))
        trainers[-1].train()
    for left, right in zip(*map(train_lines, trainers), strict=True):
        assert left == pytest.approx(right, rel=1e-5)
    assert len({line["sampled_reward"] for line in train_lines(trainers[0])}) == 4
    first, second = (trainers[0].evaluate()["eval_sampled_reward"] for _ in range(2))
    assert first == second > 0


# --- the data -------------------------------------------------------------------------------------------------------


def test_an_item_is_a_window_with_the_token_that_follows(data_folder: Path):
    data = PreparedData.open(data_folder)
    for number, split in enumerate(("train", "valid")):
        windows, items = Windows(getattr(data, split), BLOCK), PreparedWindows(data, split, BLOCK)
        inputs, targets = windows.batch([2])
        assert len(items) == len(windows)
        assert torch.equal(items[2]["input_ids"][:-1], inputs[0])
        assert torch.equal(items[2]["labels"][1:], targets[0])
        assert items[2]["window"].tolist() == [number, 2]
    with pytest.raises(UserError, match="split is 'test'; expected one of 'train', 'valid'"):
        PreparedWindows(data, "test", BLOCK)


def with_router_loss() -> MixtralForCausalLM:
    """A mixture of experts that asks for its routers' loss."""
    config = dict(vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config |= dict(num_key_value_heads=2, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=10.0)
    return MixtralForCausalLM(MixtralConfig(**config))


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "parts", "message"),
    [
        ({}, {"critics": None}, "needs a critic and none is given"),
        (
            {},
            {"model": with_router_loss()},
            "model MixtralForCausalLM: output_router_logits: True, router_aux_loss_coef: 1",
        ),
        ({}, {"critics": "no/such/model"}, "no/such/model: no such folder"),
        ({}, {"critics": "ema:0.999:500"}, "is the average of a player that is being trained; expected a model"),
        ({}, {"critics": [torch.nn.Linear(2, 2)]}, "critic is a Linear; expected a causal language model"),
        ({}, {"model": torch.nn.Linear(2, 2)}, "model is a Linear; expected a causal language model"),
        ({}, {"objective": "avatar"}, "objective is 'avatar'; expected one of .* did you mean 'avatarl'"),
        ({}, {"objective": "ppo"}, "objective 'ppo' keeps a snapshot of the player, which Trainer does not"),
        ({}, {"objective": make_objective("avatarl")}, "objective 'avatarl' brings its settings"),
        ({}, {"avatarl": AvataRLConfig(top_k=400)}, "top_k is 400; expected at most the vocabulary's 300 tokens"),
        ({}, {"processing_class": None}, "processing_class is missing; expected the tokenizer of all models"),
        ({}, {"compute_loss_func": print}, "compute_loss_func would never be called"),
        ({}, {"compute_metrics": print}, "compute_metrics would get no logits"),
        ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor has no effect"),
        ({"torch_compile": True}, {}, "torch_compile would compile nothing"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(make_trainer, settings: dict, parts: dict, message: str):
    with pytest.raises(UserError, match=message) as refusal:
        make_trainer(settings, **parts)
    assert "\n" not in str(refusal.value)


def test_a_critic_may_have_a_router_loss(make_trainer):
    make_trainer(critics=with_router_loss()).evaluate()


def test_critics_of_another_vocabulary_are_refused(make_trainer, tokenizer, tmp_path: Path, critic_folder: Path):
    small = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=8, n_layer=1, n_head=1, n_positions=BLOCK))
    with pytest.raises(UserError, match="critic GPT2LMHeadModel has 100 input rows for 300 tokens"):
        make_trainer(critics=small)
    load_critic(critic_folder, tokenizer).save_pretrained(tmp_path / "other")
    tokenizer.from_pretrained(critic_folder, additional_special_tokens=["<other>"]).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="has another vocabulary"):
        make_trainer(critics=str(tmp_path / "other"))


# --- cached critics -------------------------------------------------------------------------------------------------


def test_a_cached_critic_judges_shuffled_windows_as_the_critic_itself(
    make_trainer, data_folder: Path, cache: CriticCache
):
    shuffled = {"train_sampling_strategy": "random"}
    windows = PreparedWindows(PreparedData.open(data_folder), "train", BLOCK)
    live, cached = (
        make_trainer(shuffled, train_dataset=windows),
        make_trainer(shuffled, train_dataset=windows, critics=cache),
    )
    live.train(), cached.train()
    for left, right in zip(train_lines(cached), train_lines(live), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=2e-3)
        assert left["critic_wins"] == pytest.approx(right["critic_wins"], abs=0.02)
    assert cached.evaluate()["eval_loss"] == pytest.approx(live.evaluate()["eval_loss"], rel=2e-3)


def test_a_cache_refuses_what_it_does_not_know(make_trainer, rows: Rows, data_folder: Path, cache: CriticCache):
    with pytest.raises(UserError, match="is a cache; the batch does not say which windows it has"):
        make_trainer(train_dataset=rows, critics=cache).train()
    with pytest.raises(
        UserError, match=r"critic is a cache; expected a model, or CriticCache.open\('.*critic', data, block_size\)"
    ):
        make_trainer(critics=cache.path)
    data = PreparedData.open(data_folder)
    for windows in (PreparedWindows(data, "train", BLOCK // 2), Moved(data, "train", BLOCK)):
        with pytest.raises(UserError, match="labels are not those of their windows in .*critic; expected"):
            make_trainer(train_dataset=windows, critics=cache).train()


class Moved(PreparedWindows):
    """Says of each window that it is the one after it."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return super().__getitem__(index) | {"window": torch.tensor([0, index + 1])}
