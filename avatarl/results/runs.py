"""What run folders hold, as Python objects."""

from __future__ import annotations

import os
from pathlib import Path

from avatarl.errors import UserError
from avatarl.outside import parse_json

LONGEST_LINE = 1 << 20


def read_metrics(run: str | Path, event: str) -> list[dict]:
    """The lines of ``event`` (``train`` or ``eval``) in a run's metrics.jsonl, in order of steps.

    Raises:
        UserError: There is no such file, or a line is not what a run writes.
    """
    path = Path(run) / "metrics.jsonl"
    if not os.path.isfile(path):
        raise UserError(f"{run} has no metrics.jsonl; expected a run folder")
    lines = []
    with path.open("rb") as file:
        for number, text in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), start=1):
            try:
                line = parse_json(text)
                if line["event"] == event:
                    lines.append(line)
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}, line {number}, is not a line of metrics") from None
    return lines
