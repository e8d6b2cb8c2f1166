"""What a run logs: metrics.jsonl, TensorBoard events and a tracker's run."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from avatarl.durable import open_own, replace_file
from avatarl.places import METRICS

from .tracker import Tracker

TENSORBOARD = "tensorboard"
LARGEST_NUMBER = 1e30  # far beyond what a run logs


class RunLog:
    """The numbers of one run, as lines of metrics.jsonl, TensorBoard events and a tracker's run.

    Use as a context manager. Make one in the process that writes, and none in the others.
    """

    def __init__(
        self,
        run: Path,
        start_step: int,
        say: Callable[[str], None],
        tensorboard: bool = True,
        tracker: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        """
        Args:
            run: The run folder.
            start_step: The steps taken before; lines of later ones are cut.
            say: Shows a line to the user.
            tensorboard: Whether to write events.
            tracker: ``trackio``, ``wandb`` or None.
            settings: The run's, for the tracker to show.
        """
        path = run / METRICS
        if start_step > 0 and not path.exists():
            say(f"{path} is missing; its lines up to step {start_step} are lost")
        self._tracker = None
        if tracker:
            last_steps = {line.get("event"): line["step"] for _, line in lines_of(path)}
            self._tracker = Tracker(tracker, run, start_step, last_steps, settings or {}, say)
        cut_lines_after(path, start_step)
        self._file = open(open_own(path, os.O_WRONLY | os.O_APPEND), "a", encoding="utf-8")
        self._writer = SummaryWriter(run / TENSORBOARD, purge_step=start_step + 1) if tensorboard else None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_) -> None:
        for file in (self._file, self._writer):
            with contextlib.suppress(OSError):  # a full disk was reported by the write that failed
                if file:
                    file.close()
        if self._tracker:
            self._tracker.close()

    def write(self, event: str, step: int, values: Mapping[str, float]) -> None:
        """Add one line of numbers; ``event`` is ``train`` or ``eval``."""
        self._file.write(json.dumps({"event": event, "step": step, **values}) + "\n")
        self._file.flush()
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(f"{event}/{name}", value, step)
        if self._tracker:
            self._tracker.log(event, step, values)

    def flush(self) -> None:
        """Bring every line to the disk, before the checkpoint of the same step.

        Raises:
            OSError: TensorBoard's thread could not write earlier events.
        """
        os.fsync(self._file.fileno())
        if self._writer:
            self._writer.flush()


@contextlib.contextmanager
def without_traceback_of_tensorboard() -> Iterator[None]:
    """Keep Python from printing an error of TensorBoard's thread, which raises it again at the next call."""
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
    """Each valid line that contains ``having``, as text and as parsed JSON."""
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


def cut_lines_after(path: Path, step: int) -> None:
    """Remove the lines of steps that will be taken again, and a torn last line."""
    if not path.exists():
        return
    kept = "".join(text + "\n" for text, line in lines_of(path) if line["step"] <= step)
    if kept.encode() != path.read_bytes():
        replace_file(path, kept)


def evaluations_of(run: Path) -> list[dict[str, float]]:
    """The finite numbers of a run's evaluations so far, in order: step, tokens, FLOPs and metrics."""
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
