"""What a run writes about itself: environment.json, metrics.jsonl, TensorBoard events and a line of progress."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

LIBRARIES = ("avatarl", "torch", "transformers", "tokenizers", "datasets", "numpy")


class MetricSums:
    """Sums of metrics on the device; only :meth:`means` waits for it."""

    def __init__(self, sums: dict[str, float] | None = None):
        self._sums: dict[str, Tensor | float] = dict(sums or {})

    def add(self, metrics: dict[str, Tensor]) -> None:
        for name, value in metrics.items():
            self._sums[name] = self._sums[name] + value.detach() if name in self._sums else value.detach()

    def means(self, count: int) -> dict[str, float]:
        """Each sum divided by ``count``."""
        return {name: float(value / count) for name, value in self._sums.items()}


class RunLog:
    """Metrics of one run, as lines, events and progress. Use as a context manager."""

    def __init__(self, run: Path, total_steps: int, start_step: int, tensorboard: bool, quiet: bool):
        self._path = run / "metrics.jsonl"
        forget_lines_after(self._path, start_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._writer = SummaryWriter(run / "tensorboard", purge_step=start_step + 1) if tensorboard else None
        self._console = Console(stderr=True, quiet=quiet)
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
        self._started = time.monotonic()

    def __enter__(self) -> RunLog:
        self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()
        self._file.close()
        if self._writer:
            self._writer.close()

    def write(self, event: str, step: int, values: dict[str, float]) -> None:
        """Add one line of numbers; ``event`` is ``train`` or ``eval``."""
        self._file.write(json.dumps({"event": event, "step": step, **values}) + "\n")
        self._file.flush()
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(f"{event}/{name}", value, step)
        if event == "train":
            self._progress.update(self._task, completed=step, rate=f"{values['tokens_per_second']:,.0f} tokens/s")
        else:
            self.say(f"step {step}: validation cross-entropy {values['cross_entropy']:.4f} nats")

    def say(self, message: str) -> None:
        """One line for the person who watches."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)


def forget_lines_after(path: Path, step: int) -> None:
    """Cut the lines of steps that will be taken again, and a torn last line."""
    if not path.exists():
        return
    kept, lines = [], path.read_text(encoding="utf-8").splitlines()
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    if kept != lines:
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        partial.replace(path)


def describe_environment(device: torch.device, precision: str, data_digest: str) -> dict:
    """Command, revision, versions, device and data of a run, as its environment.json has them."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": _git_revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version(name) for name in LIBRARIES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "data_digest": data_digest,
    }


def _git_revision() -> str | None:
    """The revision of the source tree this package runs from; None for an installed one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
