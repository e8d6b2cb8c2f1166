"""Compute what a cache stores: a critic's answers for the windows of one part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from avatarl.data import PreparedData, Windows
from avatarl.errors import RunFailed
from avatarl.objective import CachedAnswers, LiveAnswers
from avatarl.objective.engine import chunk_rows
from avatarl.objective.policy import Policy

from ..loading import head_weight, last_hidden
from .parts import SPLITS, Part, new_file, record_path, write_whole
from .record import RecordFormat

COUNTED_AT_ONCE = 1 << 22


def fill_part(
    out: Path,
    part: Part,
    windows: Windows,
    model: PreTrainedModel,
    record: RecordFormat,
    seed: int,
    micro_batch_size: int,
    precision: str,
    advance: Callable[[int], None],
) -> None:
    """Compute a part and put it in its place; its record, beside it, comes last.

    Raises:
        RunFailed: The critic produced NaN.
    """
    autocast = torch.autocast(model.device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
    digest, size = hashlib.sha256(), 0
    with new_file(out / part.name) as file:
        for first in range(part.windows.start, part.windows.stop, micro_batch_size):
            chosen = range(first, min(first + micro_batch_size, part.windows.stop))
            inputs, targets = (x.to(model.device) for x in windows.batch(chosen))
            uniforms = draw_uniforms(seed, part.split, chosen, windows.block_size) if record.num_draws else None
            with torch.no_grad(), autocast:
                hidden = last_hidden(model, inputs).flatten(0, 1)
                answers = answers_of(hidden, head_weight(model), targets.flatten(), record, uniforms)
            for answer in answers:
                if answer.entropy.isnan().any():
                    advice = "try precision fp32" if precision == "bf16" else "give another critic"
                    raise RunFailed(
                        f"the critic produced NaN in {part.split} windows {chosen.start}-{chosen.stop - 1}, in "
                        f"{precision}; {advice}"
                    )
                content = record.pack(answer).tobytes()
                digest.update(content)  # of what was meant to be written, not of what is read back
                size += file.write(content)
            advance(len(chosen))
    write_whole(record_path(out, part), json.dumps({"bytes": size, "sha256": digest.hexdigest()}).encode())


def answers_of(
    hidden: Tensor, head: Tensor, targets: Tensor, record: RecordFormat, uniforms: Tensor | None
) -> Iterator[CachedAnswers]:
    """What to store of positions with hidden states (N, d) and targets (N,), a chunk of them at a time.

    ``uniforms`` (N, 1), drawn from U[0, 1), decide the drawn tokens.
    """
    head = head[: record.vocab_size].to(hidden.dtype)
    rows = chunk_rows(len(hidden), record.vocab_size, hidden.device)
    for first in range(0, len(hidden), rows):
        logits, target = hidden[first : first + rows] @ head.t(), targets[first : first + rows].unsqueeze(1)
        policy = Policy.of(logits)
        critic = LiveAnswers(logits, (policy.largest, policy.log_total))
        tokens = torch.cat([target, critic.proposals(record.num_top, None)[0]], dim=1) if record.num_top else target
        log_probs, _ = critic.log_probs_at(tokens, torch.float32)  # (n, 1 + P)
        is_new = torch.cat([torch.ones_like(target, dtype=torch.bool), tokens[:, 1:] != target], dim=1)
        log_rest = critic.log_outside(tokens, is_new, log_probs).squeeze(1)  # (n,)
        draws = tokens[:, :0]
        if uniforms is not None:
            points = uniforms[first : first + rows].to(hidden.device)
            draws, _ = critic.sample_outside(tokens, is_new, record.num_draws, points)  # (n, S)
        no_frequencies = log_probs.new_empty(0)  # nothing is estimated here
        yield CachedAnswers(tokens, log_probs, log_rest, draws, policy.entropy, no_frequencies)


def log_frequencies_of(data: PreparedData) -> np.ndarray:
    """Log relative frequencies float32 (V,) of tokens in the training text, each counted once more than it occurs."""
    counts = np.ones(data.vocab_size, dtype=np.int64)
    for first in range(0, len(data.train), COUNTED_AT_ONCE):
        ids = data.train.slice(first, min(first + COUNTED_AT_ONCE, len(data.train)))
        counts += np.bincount(ids, minlength=data.vocab_size)
    return np.log(counts / counts.sum()).astype(np.float32)


def draw_uniforms(seed: int, split: str, windows: range, block_size: int) -> Tensor:
    """A number in [0, 1) for each position (windows · block_size, 1), the same in whichever process."""
    drawn = [
        np.random.Generator(np.random.Philox(key=seed, counter=[0, SPLITS.index(split), window, 0])).random(
            (block_size, 1), dtype=np.float32
        )
        for window in windows
    ]
    return torch.from_numpy(np.concatenate(drawn))
