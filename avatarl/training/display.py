"""What a person watches while a run trains: a progress bar, and lines on standard error."""

from __future__ import annotations

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from avatarl.console import Console


class Display:
    """A progress bar on a terminal, and lines of text. Use as a context manager."""

    def __init__(self, name: str, total_steps: int, start_step: int, quiet: bool):
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
        self._task = self._progress.add_task(name, total=total_steps, completed=start_step, rate="")

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()

    def update(self, step: int, tokens_per_second: float) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=step, rate=f"{tokens_per_second:,.0f} tokens/s")

    def say(self, message: str) -> None:
        """Print one line."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)
