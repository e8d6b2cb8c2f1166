"""What a run writes while it goes: metrics.jsonl, TensorBoard events, a tracker's run and a line of progress."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from avatarl.console import Console
from avatarl.durable import open_own, replace_file
from avatarl.training.config import TrainConfig
from avatarl.training.processes import Processes

from .tracker import Tracker

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"
LARGEST_NUMBER = 1e30  # far beyond what a run logs


class MetricSums:
    """Sums of metrics on the device; only :meth:`over` waits for it."""

    def __init__(self, sums: dict[str, float] | None = None):
        self.sums: dict[str, Tensor | float] = dict(sums or {})

    def __getitem__(self, name: str) -> Tensor | float:
        return self.sums[name]

    def add(self, metrics: dict[str, Tensor], leave_out: Tensor | bool = False) -> None:
        """Add values (), or nothing where ``leave_out`` () says so."""
        for name, value in metrics.items():
            value = value.detach()
            if isinstance(leave_out, Tensor):
                value = value.masked_fill(leave_out, 0.0)
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def over(self, processes: Processes) -> dict[str, float]:
        """Each sum as the mean over processes."""
        if not self.sums:
            return {}
        device = next((value.device for value in self.sums.values() if isinstance(value, Tensor)), None)
        sums = [torch.as_tensor(value, dtype=torch.float64, device=device) for value in self.sums.values()]
        return dict(zip(self.sums, processes.mean(torch.stack(sums)).tolist(), strict=True))


class RunLog:
    """Metrics of one run, as lines, events and progress. Use as a context manager.

    ``writes`` is False in all processes but one: they are silent and touch no file.
    """

    def __init__(self, config: TrainConfig, total_steps: int, start_step: int, quiet: bool, writes: bool):
        run, quiet = Path(config.out), quiet or not writes
        self._console = Console(stderr=True, quiet=quiet)
        self._file = self._writer = self._tracker = None
        if writes:
            path, is_finished = run / METRICS, start_step == total_steps
            is_lost = start_step > 0 and not path.exists()
            if config.tracker and not is_finished:
                last_steps = {line.get("event"): line["step"] for _, line in lines_of(path)}
                self._tracker = Tracker(config.tracker, run, start_step, last_steps, config.as_dict(), self.say)
            forget_lines_after(path, start_step)
            self._file = open(open_own(path, os.O_WRONLY | os.O_APPEND), "a", encoding="utf-8")
            if config.tensorboard and not is_finished:
                self._writer = SummaryWriter(run / TENSORBOARD, purge_step=start_step + 1)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),  # a run's name may look like markup
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._progress.add_task(run.name, total=total_steps, completed=start_step, rate="")
        if writes and is_lost:
            self.say(f"{path} is missing; its lines up to step {start_step} are lost")

    def __enter__(self) -> RunLog:
        self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()
        for file in (self._file, self._writer):
            with contextlib.suppress(OSError):  # a full disk has been reported by who wrote
                if file:
                    file.close()
        if self._tracker:
            self._tracker.close()

    def write(self, event: str, step: int, values: dict[str, float]) -> None:
        """Add one line of numbers; ``event`` is ``train`` or ``eval``."""
        if self._file:
            self._file.write(json.dumps({"event": event, "step": step, **values}) + "\n")
            self._file.flush()
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(f"{event}/{name}", value, step)
        if self._tracker:
            self._tracker.log(event, step, values)
        if event == "train":
            self._progress.update(self._task, completed=step, rate=f"{values['tokens_per_second']:,.0f} tokens/s")
        else:
            self.say(f"step {step}: validation cross-entropy {values['cross_entropy']:.4f} nats")

    def flush(self) -> None:
        """Bring every line to the disk, before a checkpoint that counts on them.

        Raises:
            OSError: TensorBoard's thread could not write what it was given before.
        """
        if self._file:
            os.fsync(self._file.fileno())
        if self._writer:
            self._writer.flush()

    def say(self, message: str) -> None:
        """One line for the person who watches."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def without_traceback_of_tensorboard() -> Iterator[None]:
    """TensorBoard's thread keeps an error, and raises it at the next call; let nothing print it before."""
    before = threading.excepthook

    def hook(uncaught: threading.ExceptHookArgs) -> None:
        if not type(uncaught.thread).__module__.startswith("tensorboard."):
            before(uncaught)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def lines_of(path: Path, having: str = "") -> Iterator[tuple[str, dict]]:
    """The lines of a file of metrics that hold a text, as they are and as read; what no run writes is left out."""
    if not path.exists():
        return
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if having not in text:
            continue
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and type(line.get("step")) is int:
            yield text, line


def forget_lines_after(path: Path, step: int) -> None:
    """Cut the lines of steps that will be taken again, and a torn last line."""
    if not path.exists():
        return
    kept = "".join(text + "\n" for text, line in lines_of(path) if line["step"] <= step)
    if kept.encode() != path.read_bytes():
        replace_file(path, kept)


def evaluations_of(run: Path) -> list[dict[str, float]]:
    """Step, tokens, FLOPs and metrics of a run's evaluations so far, in order, as far as they are finite numbers."""
    evaluations = []
    for _, line in lines_of(run / METRICS, having='"event": "eval"'):
        numbers = {
            name: value
            for name, value in line.items()
            if isinstance(value, (int, float)) and abs(value) < LARGEST_NUMBER
        }
        if {"step", "tokens", "cross_entropy"} <= numbers.keys() and numbers["tokens"] > 0:
            evaluations.append(numbers)
    return evaluations
