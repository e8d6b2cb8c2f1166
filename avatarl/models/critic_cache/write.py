"""Read the data once with a critic, and store its answers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from avatarl.console import Console
from avatarl.errors import RunFailed, UserError
from avatarl.objective.config import require_choice, require_whole
from avatarl.places import CONFIG
from avatarl.sanitise import one_line
from avatarl.untrusted import check_place, read_yaml

from .parts import FORMAT_VERSION, Part, finish, is_done, parts_of, start, windows_of
from .record import KINDS, RecordFormat

DEFAULT_BLOCK_SIZE = 256  # for a critic that reads windows of any length
LINES_OF_PROGRESS = 20  # where there is no terminal to draw a bar on


def cache_critic(
    critic: str,
    data: str | Path,
    out: str | Path,
    *,
    block_size: int | None = None,
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
    """Store a critic's answers at every position of the data, so that training needs no critic in memory.

    Repeat the same command to continue after an interruption. Under ``torchrun`` each process takes its share.

    Args:
        critic: A run folder, a model folder, a Hub id, or random:PRESET:SEED.
        data: A prepared data folder; both splits are read.
        out: Folder to make.
        block_size: Tokens in a window, as in the runs that will use the cache. The default is the critic's own context:
            the block_size of its run, else the longest window it reads, else 256.
        kind: top stores the critic's most likely tokens and the mass of the rest; sample stores tokens drawn from its
            distribution, an unbiased estimate of it (Anshumann et al., "Sparse Logit Sampling", arXiv 2503.16870).
        bytes_per_token: Bytes per position: 6, and 4 for a top token or 2 for a drawn one (6 and 4 with a vocabulary
            above 65,536).
        keep_top: With kind sample, store so many most likely tokens exactly, and draw from the rest.
        train_windows: How many windows of the training split, as in the runs that will use the cache (default: all).
        seed: Decides the drawn tokens.
        micro_batch_size: Windows in a forward pass.
        precision: bf16, fp32 or auto, as in the runs that will use the cache.
        critic_quantization: Holds the critic's weights in fewer bits; the settings that a recipe has.
        device: cpu, cuda or auto.
        quiet: Print nothing.

    Returns:
        The content of ``cache.json``; without ``files`` where other processes are still at work.

    Raises:
        UserError: The critic, the data, a setting or ``out`` cannot be used.
        RunFailed: ``out`` cannot be written, or has no room, or the critic produced NaN.
    """
    import torch

    from avatarl.data import PreparedData
    from avatarl.device import launched_as, pick_device, pick_precision

    from ..critics import open_critic
    from ..digest import weight_files
    from ..loading import check_window
    from .answers import fill_part, log_frequencies_of

    out = Path(out)
    check_place(out)
    least = {"block_size": 1, "bytes_per_token": 1, "keep_top": 0, "train_windows": 1, "seed": 0, "micro_batch_size": 1}
    given = dict(
        zip(least, (block_size, bytes_per_token, keep_top, train_windows, seed, micro_batch_size), strict=True)
    )
    for name, value in given.items():
        if value is not None:
            require_whole(name, value, least[name])
    require_choice("kind", kind, KINDS)
    require_choice("precision", precision, ("auto", "bf16", "fp32"))
    if kind == "top" and keep_top:
        raise UserError(
            f"keep_top is {keep_top}, which kind='sample' uses; kind='top' keeps what bytes_per_token allows"
        )
    if seed >= 1 << 63:
        raise UserError(f"seed is {seed}; expected a whole number below 2^63")
    rank, count, local_rank = launched_as()
    prepared = PreparedData.open(data)
    record = RecordFormat.within(kind, bytes_per_token, keep_top, prepared.vocab_size)
    chosen = pick_device(device, local_rank)
    precision = pick_precision(precision, chosen)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # Before they are loaded: should they change meanwhile, this will not be their cache.
    files = weight_files(critic)
    opened = open_critic(
        critic, prepared.load_tokenizer(), dtype=dtype, device=chosen, quantization=critic_quantization
    )
    model, longest = opened.model, opened.longest
    if block_size is None:
        block_size = _context_of(critic, longest)
        if not quiet and rank == 0:
            _print(f"block_size is {block_size}, the context of critic {critic}")
    if longest is not None and longest < block_size:
        raise UserError(
            f"block_size is {block_size}; expected at most {longest}, what critic {critic} was made to read"
        )
    splits = windows_of(prepared, block_size, train_windows)
    check_window(model, block_size, f"critic {critic}")
    identity = _identity(prepared, splits, record, precision, critic, model, files)
    if os.path.exists(critic):  # wherever both are found later; its SHA-256 says whether it is the same
        identity["critic"] |= {"name": os.path.abspath(critic), "place": os.path.relpath(critic, out)}
    identity |= {"kind": kind, "seed": seed if record.num_draws else None}
    parts, log_frequencies = list(parts_of(identity)), log_frequencies_of(prepared)
    try:
        start(out, identity, parts, log_frequencies)
        todo = [part for part in parts[rank::count] if not is_done(out, part)]
        with _progress(out, parts[rank::count], todo, block_size, quiet or rank > 0) as advance:
            for part in todo:
                fill_part(out, part, splits[part.split], model, record, seed, micro_batch_size, precision, advance)
        return finish(out, identity, parts)
    except OSError as error:
        raise RunFailed(
            f"{out} cannot be written ({error.strerror or error}); finished parts stay, and the same command continues"
        ) from error


def _context_of(critic: str, longest: int | None) -> int:
    """The windows that a critic was made for: those of its run, else the longest it reads, else 256 tokens."""
    if os.path.isfile(Path(critic) / CONFIG):
        settings = read_yaml(Path(critic) / CONFIG)
        block_size = settings.get("block_size") if isinstance(settings, dict) else None
        if type(block_size) is int and block_size > 0:
            return block_size
    return longest or DEFAULT_BLOCK_SIZE


def _identity(data, splits, record: RecordFormat, precision: str, critic: str, model, files: dict | None) -> dict:
    """All that decides what is stored, and what it is tied to."""
    from ..counting import count_parameters, forward_flops_per_token
    from ..digest import digest_of_model, digest_of_tokenizer

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


# --- the screen -----------------------------------------------------------------------------------------------------


def _print(message: str) -> None:
    Console(stderr=True).print(message, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _progress(
    out: Path, mine: list[Part], todo: list[Part], block_size: int, quiet: bool
) -> Iterator[Callable[[int], None]]:
    """Show progress in tokens on stderr; yield the function to call with the number of windows just read."""
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
    if done and todo and not quiet:
        _print(f"{out} continues after {done:,} of {total:,} tokens")
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task(one_line(out.name), total=total, completed=done, rate="")
        started, completed, printed = time.monotonic(), done, done

        def advance(windows: int) -> None:
            nonlocal completed, printed
            completed += windows * block_size
            rate = f"{(completed - done) / (time.monotonic() - started):,.0f} tokens/s"
            progress.update(task, completed=completed, rate=rate)
            if not quiet and not console.is_terminal and completed - printed >= total / LINES_OF_PROGRESS:
                printed = completed
                _print(f"{completed:,} of {total:,} tokens, {rate}")

        yield advance
