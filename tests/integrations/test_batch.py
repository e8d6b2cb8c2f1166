"""Whatever rows a collator makes, and whatever else it puts into a batch, they are read as Trainer reads them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from avatarl import UserError
from avatarl.models import build_player

from ..conftest import BLOCK, TINY_PLAYER
from .conftest import Rows


class Texts(Dataset):
    """Rows of their own lengths, of which a collator makes batches."""

    def __init__(self, rows: Tensor):
        self.rows = [row[: 5 + 2 * number] for number, row in enumerate(rows)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index]


def padded(rows: list[Tensor]) -> dict[str, Tensor]:
    """A row of each text."""
    ids, labels = (pad_sequence(rows, batch_first=True, padding_value=value) for value in (0, -100))
    return {"input_ids": ids, "labels": labels, "attention_mask": (labels != -100).long()}


def cut(rows: list[Tensor]) -> dict[str, Tensor]:
    """Several rows of each text: its first five tokens, its next five, …"""
    return padded([part for row in rows for part in row.split(5) if len(part) > 1])


def packed(rows: list[Tensor]) -> dict[str, Tensor]:
    """One row of all texts."""
    labels = [torch.cat([torch.tensor([-100]), row[1:]]) for row in rows]
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    return {"input_ids": torch.cat(rows)[None], "labels": torch.cat(labels)[None], "position_ids": positions[None]}


@pytest.mark.parametrize("collator", [padded, cut, packed])
def test_an_evaluation_does_not_depend_on_its_batches(make_trainer, rows: Rows, tokenizer, collator):
    """Whatever rows a collator makes of so many texts."""
    parts = dict(data_collator=collator, eval_dataset=Texts(rows.input_ids[:6]))
    model = build_player(TINY_PLAYER, tokenizer, 64, seed=1)
    found = [
        make_trainer({"per_device_eval_batch_size": size}, model=model, critics=model, optimizers=(None, None), **parts)
        for size in (6, 5, 4, 1)
    ]
    whole, *others = [trainer.evaluate() for trainer in found]
    for other in others:
        for name in ("eval_loss", "eval_cross_entropy", "eval_expected_reward"):
            assert other[name] == pytest.approx(whole[name], rel=1e-5)


def extras_of(batch: dict[str, Tensor], extra: str) -> dict[str, Any]:
    """A batch (B, T) with another entry, or with its mask in another form."""
    size, length = batch["input_ids"].shape
    mask = batch.pop("attention_mask")
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None] & mask[:, None, None].bool()
    ends = torch.tensor([0, length // 2, length], dtype=torch.int32)
    return {
        "mask of pairs": {**batch, "attention_mask": causal},
        "numbers of rows": {**batch, "attention_mask": mask, "lengths": mask.sum(dim=1)},
        "as many rows as tokens": {**batch, "attention_mask": mask, "lengths": torch.zeros(length)},
        "a number": {**batch, "attention_mask": mask, "max_length_q": 5},
        "a word": {**batch, "attention_mask": mask, "name": "five"},
        "ends of packed texts": {**batch, "attention_mask": mask, "cu_seq_lens_q": ends, "cu_seq_lens_k": ends},
    }[extra]


EXTRAS = ("mask of pairs", "numbers of rows", "as many rows as tokens", "a number", "a word", "ends of packed texts")


@pytest.mark.parametrize("extra", EXTRAS)
def test_whatever_else_a_batch_holds_is_read_as_trainer_reads_it(make_trainer, rows: Rows, extra: str):
    given = []

    def collated(texts: list[Tensor]) -> dict[str, Any]:
        return extras_of(padded(texts), extra)

    trainer = make_trainer(
        {"per_device_eval_batch_size": 6}, data_collator=collated, eval_dataset=Texts(rows.input_ids[:6])
    )
    trainer.model.base_model.register_forward_pre_hook(lambda _, args, reads: given.append(reads), with_kwargs=True)
    found = trainer.evaluate()
    with torch.no_grad():
        expected = trainer.model(**padded(trainer.eval_dataset.rows)).loss.item()
    assert found["eval_cross_entropy"] == pytest.approx(expected, rel=1e-5)
    length = len(trainer.eval_dataset.rows[-1]) - 1
    assert given[0]["input_ids"].shape[1] == length
    if extra == "mask of pairs":
        assert given[0]["attention_mask"].shape == (6, 1, length, length)
    if extra == "as many rows as tokens":
        assert given[0]["lengths"].shape == (length + 1,)
    if extra == "ends of packed texts":
        assert given[0]["cu_seq_lens_q"].tolist() == [0, (length + 1) // 2, length]


def test_an_entry_that_no_model_reads_is_named(make_trainer, rows: Rows):
    def wrong(texts: list[Tensor]) -> dict[str, Tensor]:
        batch = padded(texts)
        return {**batch, "attention_mask": batch["attention_mask"][:, :-2]}

    texts = Texts(rows.input_ids[:6])
    with pytest.raises(UserError, match=r"cannot read a batch of .*attention_mask \(6, 13\).*; expected .*\(B, T\)"):
        make_trainer({"per_device_eval_batch_size": 6}, data_collator=wrong, eval_dataset=texts).evaluate()


def test_batches_that_cannot_be_read_are_refused(make_trainer, rows: Rows):
    class WithoutLabels(Rows):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {"input_ids": self.input_ids[index]}

    with pytest.raises(UserError, match="a batch has input_ids; expected labels too"):
        make_trainer(train_dataset=WithoutLabels(rows.input_ids)).train()
    with pytest.raises(UserError, match="a batch has input_ids; expected labels too"):
        make_trainer(eval_dataset=WithoutLabels(rows.input_ids)).evaluate()
    with pytest.raises(
        UserError, match=f"a batch has {2 * BLOCK + 1} tokens to read and one to predict; .* read {BLOCK}"
    ):
        make_trainer(eval_dataset=Rows(rows.input_ids.repeat(1, 2))).evaluate()
