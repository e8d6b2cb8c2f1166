"""What run folders hold, as Python objects."""

from __future__ import annotations

import json
from pathlib import Path

from avatarl.errors import UserError


def read_metrics(run: str | Path, event: str) -> list[dict]:
    """The lines of ``event`` (``train`` or ``eval``) in a run's metrics.jsonl, in order of steps.

    Raises:
        UserError: There is no such file, or a line is not what a run writes.
    """
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{run} has no metrics.jsonl; expected a run folder")
    lines = []
    for number, text in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            line = json.loads(text)
            if line["event"] == event:
                lines.append(line)
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {number}, is not a line of metrics") from None
    return lines
