"""A run in an experiment tracker: trackio or Weights & Biases, by the few calls that both have.

A tracker gets the numbers of metrics.jsonl under TensorBoard's names. If it fails, the run continues without it.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import secrets
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from avatarl.durable import replace_file
from avatarl.errors import UserError
from avatarl.sanitise import one_line
from avatarl.untrusted import read_json

PROJECT = "avatarl"
RECORD = "tracker.json"
NETWORK_SECONDS = 60  # that wandb may wait for an answer at the start, and for the last lines to arrive at the end


def check_tracker(library: str | None) -> None:
    """Refuse a tracker that is not installed; UserError names the setting and what installs it."""
    spec = find_spec(library) if library else None
    # A mere folder of that name, as wandb makes them, counts as a package without an origin.
    if library and (spec is None or spec.origin is None):
        raise UserError(f"tracker is {library!r}, which is not installed; pip install 'avatarl[{library}]'")


class Tracker:
    """One run of a tracker, which a resumed training run continues; no step is logged twice.

    tracker.json in the run's folder holds its name, and the last steps with lines when the run was last resumed. Steps
    after the checkpoint are taken again then, and give the same lines.
    """

    def __init__(
        self,
        library: str,
        run: Path,
        start_step: int,
        last_steps: Mapping[str, int],
        settings: Mapping[str, Any],
        say: Callable[[str], None],
    ):
        """
        Args:
            library: ``trackio`` or ``wandb``.
            run: The run folder.
            start_step: The steps taken before; at 0 a new run starts in the tracker too.
            last_steps: By event, the last step with a line in metrics.jsonl.
            settings: The run's, for the tracker to show.
            say: Shows a line to the user: the run's name in the tracker, and the first failure.
        """
        self._name, self._say, self._library = library, say, None
        record = read_record(run / RECORD) if start_step else None
        if record is None or record["library"] != library:
            folder_name = re.sub(r"[^A-Za-z0-9_.-]+", "-", run.resolve().name)[:60]
            record = {"library": library, "name": f"{folder_name}-{secrets.token_hex(4)}", "logged": {}}
        else:
            for event, step in last_steps.items():
                record["logged"][event] = max(step, record["logged"].get(event, 0))
        replace_file(run / RECORD, json.dumps(record) + "\n")
        self._logged, name = record["logged"], record["name"]
        network = {"init_timeout": NETWORK_SECONDS, "finish_timeout": NETWORK_SECONDS}
        options = {
            "trackio": {"embed": False},
            "wandb": {"id": name, "dir": run, "settings": {"silent": True, "console": "off", **network}},
        }
        with self._failing_alone(), contextlib.redirect_stdout(io.StringIO()):
            self._library = importlib.import_module(library)
            tracked = self._library.init(
                project=PROJECT, name=name, config=dict(settings), resume="allow", **options[library]
            )
            address = None if getattr(tracked, "offline", False) else tracked.url
            say(f"{library} tracks the run as {PROJECT}/{name}" + (f", {address}" if address else ""))

    def log(self, event: str, step: int, values: Mapping[str, float]) -> None:
        """Send numbers as ``EVENT/NAME``, unless they were sent before the resume."""
        if self._library and step > self._logged.get(event, 0):
            with self._failing_alone():
                # As floats: FLOPs outgrow the 64 bits that others keep whole numbers in.
                self._library.log({f"{event}/{name}": float(value) for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Wait until all is sent, but not for ever."""
        if self._library:
            with self._failing_alone(), contextlib.redirect_stdout(io.StringIO()):
                self._library.finish()

    @contextlib.contextmanager
    def _failing_alone(self):
        """Report the first failure and use the tracker no more."""
        try:
            yield
        except Exception as error:
            self._library = None
            self._say(f"{self._name} no longer tracks the run ({one_line(str(error)) or type(error).__name__})")


def read_record(path: Path) -> dict | None:
    """The content of tracker.json; None if it is missing or not valid."""
    try:
        record = read_json(path)
        logged = {str(event): int(step) for event, step in record["logged"].items()}
        return {"library": record["library"], "name": str(record["name"]), "logged": logged}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
