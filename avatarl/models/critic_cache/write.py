"""Reading the data once with a critic, and keeping what objectives will ask of it."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedModel

from avatarl.console import Console
from avatarl.data import PreparedData, Windows
from avatarl.device import launched_as, pick_device, pick_precision
from avatarl.errors import RunFailed, UserError
from avatarl.objective import CachedAnswers, LiveAnswers
from avatarl.objective.config import require_choice, require_whole
from avatarl.objective.engine import chunk_rows
from avatarl.objective.policy import Policy
from avatarl.sanitise import one_line
from avatarl.untrusted import check_place

from ..counting import count_parameters, forward_flops_per_token
from ..critics import load_critic
from ..digest import digest_of_model, digest_of_tokenizer, weight_files
from ..loading import check_window, head_weight, last_hidden, longest_sequence
from .parts import (
    FORMAT_VERSION,
    SPLITS,
    Part,
    finish,
    is_done,
    new_file,
    parts_of,
    record_path,
    start,
    windows_of,
    write_whole,
)
from .record import KINDS, RecordFormat

COUNTED_AT_ONCE = 1 << 22
LINES_OF_PROGRESS = 20  # where there is no terminal to draw a bar on


def cache_critic(
    critic: str,
    data: str | Path,
    out: str | Path,
    *,
    block_size: int = 256,
    kind: str = "top",
    bytes_per_token: int = 134,
    keep_top: int = 0,
    train_windows: int | None = None,
    seed: int = 1,
    micro_batch_size: int = 16,
    precision: str = "auto",
    critic_quantization: Mapping[str, Any] | None = None,
    device: str = "auto",
    quiet: bool = False,
) -> dict:
    """Store what objectives will ask of a critic at every position of the data.

    Repeat the same command to go on after an interruption. Under ``torchrun`` each process takes its share.

    Args:
        critic: A run folder, a model folder, a hub id, or ``random:PRESET:SEED``.
        data: A prepared data folder; both splits are read.
        out: The folder to make.
        block_size: Tokens in a window, as in the runs that will use it.
        kind: ``top``, the critic's most likely tokens and the mass of the rest, or ``sample``, tokens drawn from its
            distribution: an unbiased estimate of it (Anshumann et al., "Sparse Logit Sampling", arXiv 2503.16870).
        bytes_per_token: The budget of a position; :mod:`.record` says what it buys.
        keep_top: With ``sample``, keep so many most likely tokens exactly, and draw from the rest.
        train_windows: How many windows of the training split, as in the runs that will use it (None: all).
        seed: Decides the drawn tokens.
        micro_batch_size: Windows in a forward pass.
        precision: ``bf16``, ``fp32`` or ``auto``, as in the runs that will use it.
        critic_quantization: Holds the critic's weights in fewer bits; see :func:`~avatarl.models.load_model`.
        device: ``cpu``, ``cuda`` or ``auto``.
        quiet: Print nothing.

    Returns:
        What ``cache.json`` says; without ``files`` where other processes are still at work.

    Raises:
        UserError: The critic, the data, a setting or ``out`` cannot be used.
        RunFailed: ``out`` cannot be written, or has no room.
    """
    out = Path(out)
    check_place(out)
    require_choice("kind", kind, KINDS)
    for name, value, minimum in (
        ("block_size", block_size, 1),
        ("bytes_per_token", bytes_per_token, 1),
        ("keep_top", keep_top, 0),
        ("seed", seed, 0),
        ("micro_batch_size", micro_batch_size, 1),
        *((("train_windows", train_windows, 1),) if train_windows is not None else ()),
    ):
        require_whole(name, value, minimum)
    if kind == "top" and keep_top:
        raise UserError(
            f"keep_top is {keep_top}, which kind='sample' uses; kind='top' keeps what bytes_per_token allows"
        )
    if seed >= 1 << 63:
        raise UserError(f"seed is {seed}; expected a whole number below 2^63")
    require_choice("precision", precision, ("auto", "bf16", "fp32"))
    rank, count, local_rank = launched_as()
    prepared = PreparedData.open(data)
    splits = windows_of(prepared, block_size, train_windows)
    record = RecordFormat.within(kind, bytes_per_token, keep_top, prepared.vocab_size)
    chosen = pick_device(device, local_rank)
    precision = pick_precision(precision, chosen)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # Before they are loaded: should they change meanwhile, this will not be their cache.
    files = weight_files(critic)
    model = load_critic(critic, prepared.load_tokenizer(), dtype, chosen, critic_quantization)
    longest = longest_sequence(model)
    if longest is not None and longest < block_size:
        raise UserError(
            f"block_size is {block_size}; expected at most {longest}, what critic {critic} was made to read"
        )
    check_window(model, block_size, f"critic {critic}")
    identity = identity_of_cache(prepared, splits, record, precision, critic, model, files)
    if os.path.exists(critic):  # wherever both are found later; its SHA-256 says whether it is the same
        identity["critic"] |= {"name": os.path.abspath(critic), "place": os.path.relpath(critic, out)}
    identity |= {"kind": kind, "seed": seed if record.num_draws else None}
    parts, log_frequencies = list(parts_of(identity)), log_frequencies_of(prepared)
    with _failures_in_one_line(out):
        start(out, identity, parts, log_frequencies)
        todo = [part for part in parts[rank::count] if not is_done(out, part)]
        with _progress(out, parts[rank::count], todo, block_size, quiet or rank > 0) as advance:
            for part in todo:
                fill_part(out, part, splits[part.split], model, record, seed, micro_batch_size, precision, advance)
        return finish(out, identity, parts)


def identity_of_cache(
    data: PreparedData,
    splits: Mapping[str, Windows],
    record: RecordFormat,
    precision: str,
    critic: str,
    model: PreTrainedModel,
    files: dict[str, dict] | None,
) -> dict:
    """All that decides what is stored, and what it is tied to."""
    block_size = splits["train"].block_size
    return {
        "format_version": FORMAT_VERSION,
        "block_size": block_size,
        "num_top": record.num_top,
        "num_draws": record.num_draws,
        "bytes_per_token": record.dtype.itemsize,
        "vocab_size": record.vocab_size,
        "precision": precision,
        "data": data.digest,
        "windows": {split: len(windows) for split, windows in splits.items()},
        "tokenizer": digest_of_tokenizer(data),
        "critic": {
            "name": critic,
            "sha256": digest_of_model(model),
            "files": files,
            "parameters": count_parameters(model).total,
            "flops_per_token": forward_flops_per_token(model, block_size),
        },
    }


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
        RunFailed: The critic's answers are no numbers.
    """
    autocast = torch.autocast(model.device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
    digest, size = hashlib.sha256(), 0
    with new_file(out / part.name) as file:
        for first in range(part.windows.start, part.windows.stop, micro_batch_size):
            chosen = range(first, min(first + micro_batch_size, part.windows.stop))
            inputs, targets = (x.to(model.device) for x in windows.batch(chosen))
            draws = draw_uniforms(seed, part.split, chosen, windows.block_size) if record.num_draws else None
            with torch.no_grad(), autocast:
                hidden = last_hidden(model, inputs).flatten(0, 1)
                answers = answers_of(hidden, head_weight(model), targets.flatten(), record, draws)
            for answer in answers:
                if answer.entropy.isnan().any():
                    advice = "try precision fp32" if precision == "bf16" else "a critic that gives numbers is expected"
                    raise RunFailed(
                        f"the critic says what is no number in {part.split} windows {chosen.start} to "
                        f"{chosen.stop - 1}, in {precision}; {advice}"
                    )
                content = record.pack(answer).tobytes()
                digest.update(content)  # of what was meant to be written, not of what is read back
                size += file.write(content)
            advance(len(chosen))
    described = json.dumps({"bytes": size, "sha256": digest.hexdigest()})
    write_whole(record_path(out, part), described.encode())


def answers_of(
    hidden: Tensor, head: Tensor, targets: Tensor, record: RecordFormat, uniforms: Tensor | None
) -> Iterator[CachedAnswers]:
    """What to store of positions with hidden states (N, d) and targets (N,), a chunk of them at a time.

    ``uniforms`` (N, 1) in [0, 1) decide the drawn tokens.
    """
    head = head[: record.vocab_size].to(hidden.dtype)
    rows = chunk_rows(len(hidden), record.vocab_size, hidden.device)
    for first in range(0, len(hidden), rows):
        logits, target = hidden[first : first + rows] @ head.t(), targets[first : first + rows].unsqueeze(1)
        policy = Policy.of(logits)
        critic = LiveAnswers(logits, (policy.largest, policy.log_total))
        tokens = torch.cat([target, critic.proposals(record.num_top, None)[0]], dim=1) if record.num_top else target
        log_probs, _ = critic.log_probs_at(tokens, torch.float32)
        is_new = torch.cat([torch.ones_like(target, dtype=torch.bool), tokens[:, 1:] != target], dim=1)
        log_rest = critic.log_outside(tokens, is_new, log_probs).squeeze(1)
        draws = tokens[:, :0]
        if uniforms is not None:
            points = uniforms[first : first + rows].to(hidden.device)
            draws, _ = critic.sample_outside(tokens, is_new, record.num_draws, points)
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
    """One number in [0, 1) for each position (windows · block_size, 1), whoever draws it."""
    drawn = [
        np.random.Generator(np.random.Philox(key=seed, counter=[0, SPLITS.index(split), window, 0])).random(
            (block_size, 1), dtype=np.float32
        )
        for window in windows
    ]
    return torch.from_numpy(np.concatenate(drawn))


# --- the screen ------------------------------------------------------------------------------------------------------


@contextmanager
def _progress(
    out: Path, mine: list[Part], todo: list[Part], block_size: int, quiet: bool
) -> Iterator[Callable[[int], None]]:
    """Progress in tokens on stderr; yields what is told of each window that is read."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    total, waiting = (block_size * sum(len(part.windows) for part in parts) for parts in (mine, todo))
    done = total - waiting

    def say(message: str) -> None:
        console.print(message, markup=False, highlight=False, soft_wrap=True)

    if done and todo and not quiet:
        say(f"{out} goes on after {done:,} of {total:,} tokens")
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task(one_line(out.name), total=total, completed=done, rate="")
        started, said = time.monotonic(), done

        def advance(windows: int) -> None:
            nonlocal said
            progress.advance(task, windows * block_size)
            completed = int(progress.tasks[0].completed)
            rate = f"{(completed - done) / (time.monotonic() - started):,.0f} tokens/s"
            progress.update(task, rate=rate)
            if not quiet and not console.is_terminal and completed - said >= total / LINES_OF_PROGRESS:
                said = completed
                say(f"{completed:,} of {total:,} tokens, {rate}")

        yield advance


@contextmanager
def _failures_in_one_line(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunFailed(
            f"{out} cannot be written ({error.strerror or error}); the parts that are done stay, and the same command "
            "goes on"
        ) from error
