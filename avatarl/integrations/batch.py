"""What a batch of Trainer's holds: what is predicted, what player and critics read of it, and the critics' answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from avatarl.errors import UserError
from avatarl.models import Critic
from avatarl.models.critics import CriticInputs
from avatarl.models.loading import last_hidden, longest_sequence, one_line
from avatarl.objective import Answers

IGNORED = -100
SPLITS = ("train", "valid")


def labels_of(batch: dict[str, Tensor]) -> Tensor:
    """What is to be predicted (B, T).

    Raises:
        UserError: There are no labels, or they are not of the shape of the tokens.
    """
    tokens, labels = batch.get("input_ids"), batch.get("labels")
    if tokens is None or labels is None:
        missing = "input_ids" if tokens is None else "labels"
        raise UserError(
            f"a batch has {', '.join(batch)}; expected {missing} too, the same tokens as labels and input_ids"
        )
    if tokens.dim() != 2 or tokens.shape != labels.shape:
        raise UserError(f"a batch has {_shapes(batch)}; expected input_ids and labels of one shape (B, T)")
    return labels


def targets_of(batch: dict[str, Tensor]) -> Tensor:
    """What follows each token that is read (B, T − 1)."""
    return labels_of(batch)[:, 1:]


def count_valid(targets: Tensor) -> Tensor:
    """How many positions are not ignored ()."""
    return (targets != IGNORED).sum()


def reads_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the models read, without the last token (B, T − 1)."""
    length = batch["input_ids"].shape[1]

    def read(name: str, values: Any) -> Any:
        if not isinstance(values, Tensor):
            return values
        if name.startswith("cu_seq_lens"):  # where each of the packed texts ends
            return values.clamp(max=length - 1)
        # (B, T), and the last two of (B, 1, T, T); the first may be T by chance.
        for dim in range(max(1, values.dim() - 2), values.dim()):
            if values.shape[dim] == length:
                values = values.narrow(dim, 0, length - 1)
        return values

    return {name: read(name, values) for name, values in batch.items() if name not in ("labels", "window")}


def _shapes(batch: dict[str, Any]) -> str:
    """The entries of a batch, and their shapes."""
    shapes = ((name, tuple(values.shape) if isinstance(values, Tensor) else values) for name, values in batch.items())
    return ", ".join(f"{name} {shape}" for name, shape in shapes)


def answers_of(critic: Critic, batch: dict[str, Tensor]) -> Answers:
    """A critic's answers for positions (B, T − 1).

    Raises:
        UserError: The critic does not know the batch, or cannot read it.
    """
    reads, targets = reads_of(batch), targets_of(batch)
    split = indices = None
    if "window" in batch:
        (number, *_), indices = batch["window"].t().tolist()
        split = SPLITS[number]
    tokens = reads.pop("input_ids")
    with _refusing_unreadable(critic.name, critic.longest, tokens, reads):
        answers = critic.answers(CriticInputs(tokens, split, indices, reads))
    if not answers.are_for(targets, IGNORED):
        raise UserError(f"labels are not those of their windows in {critic.name}; expected PreparedWindows of its data")
    return answers


def last_hidden_of(model: PreTrainedModel, reads: dict[str, Tensor]) -> Tensor:
    """Hidden states (B, T − 1, d).

    Raises:
        UserError: The model was made for shorter sequences, or cannot read what is beside the tokens.
    """
    tokens = reads.pop("input_ids")
    with _refusing_unreadable(name_of(model), longest_sequence(model), tokens, reads):
        return last_hidden(model, tokens, **reads)


@contextmanager
def _refusing_unreadable(name: str, longest: int | None, tokens: Tensor, others: dict[str, Tensor]) -> Iterator[None]:
    length = tokens.shape[1]
    if longest is not None and length > longest:
        raise UserError(f"a batch has {length} tokens to read and one to predict; {name} was made to read {longest}")
    try:
        yield
    except (torch.OutOfMemoryError, UserError):
        raise
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{name} cannot read a batch of {_shapes({'input_ids': tokens, **others})}: {one_line(error)}; expected "
            "what its forward takes, with an entry for each of the tokens (B, T), or for each pair of them (B, 1, T, T)"
        ) from error


def name_of(model: nn.Module) -> str:
    """Where a model came from, or its class."""
    return getattr(model, "name_or_path", "") or type(model).__name__
