"""What a person watches while a run trains: a progress bar, and lines on standard error."""

from __future__ import annotations

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from avatarl.console import Console

NAME = TextColumn("{task.description}", markup=False)  # a run's name may look like markup
STEPS = "{task.completed}/{task.total} steps", "{task.fields[rate]}"


class Display(Progress):
    """A progress bar on a terminal, and lines of text. Use as a context manager."""

    def __init__(self, name: str, total_steps: int, start_step: int, quiet: bool):
        console = Console(stderr=True, quiet=quiet)
        is_hidden = quiet or not console.is_terminal
        times = TimeElapsedColumn(), "left", TimeRemainingColumn()
        super().__init__(NAME, BarColumn(), *STEPS, *times, console=console, disable=is_hidden)
        self.add_task(name, total=total_steps, completed=start_step, rate="")

    def show_step(self, step: int, tokens_per_second: float) -> None:
        """Move the bar."""
        self.update(self.task_ids[0], completed=step, rate=f"{tokens_per_second:,.0f} tokens/s")

    def say(self, message: str) -> None:
        """Print one line."""
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)
