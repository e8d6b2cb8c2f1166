"""Where a run ran: command, revision, versions, device, precision."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

import avatarl

PACKAGE = Path(avatarl.__file__).parent
LIBRARIES = ("avatarl", "torch", "transformers", "tokenizers", "datasets", "numpy")


def describe_environment(device: torch.device, precision: str, process_count: int, identity: Mapping[str, str]) -> dict:
    """Command, revision, versions, device, processes and identity of a run, as its environment.json has them."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name.replace("__main__.py", "avatarl"), *sys.argv[1:]]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": _git_revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        # Of PyTorch its build too (2.13.0+cu130), which a package from PyPI does not name in its own version.
        "versions": {**{name: version(name) for name in LIBRARIES}, "torch": str(torch.__version__)},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "processes": process_count,
        "threads": torch.get_num_threads(),
        "precision": precision,
        "data_digest": identity["data"],
        "identity": dict(identity),
    }


def _git_revision() -> str | None:
    """The revision of the source tree this package runs from; None for an installed one."""
    root = PACKAGE.parent
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
