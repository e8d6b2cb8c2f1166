"""Checkpoints that are whole or absent: written beside, renamed, and complete only with their manifest.

checkpoints/step-00000500/
  player.safetensors   snapshot.safetensors (ppo)   optimiser.pt   state.json   manifest.json (written last)
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from avatarl.errors import UserError

MANIFEST = "manifest.json"


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` optimiser steps lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def save_checkpoint(run: Path, step: int, write_files: Callable[[Path], None], keep: int) -> None:
    """Write a checkpoint with ``write_files(folder)``, make it appear at once, and keep only the newest ``keep``.

    Checkpoints of later steps go too: the run fell back behind them because they are damaged.
    """
    final = checkpoint_path(run, step)
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_files(partial)
    for path in sorted(partial.iterdir()):
        _flush(path)
    (partial / MANIFEST).write_text(json.dumps({"step": step, "files": _describe(partial)}, indent=1))
    _flush(partial / MANIFEST)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _flush(final.parent)
    complete = complete_checkpoints(run)
    kept = [path for path in complete if path <= final][-keep:]
    for path in complete:
        if path not in kept:
            shutil.rmtree(path)


def complete_checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders that have a manifest, oldest first."""
    return sorted(path.parent for path in run.glob(f"checkpoints/step-*/{MANIFEST}"))


def newest_good_checkpoint(run: Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are what its manifest says; None when none was ever completed.

    Raises:
        UserError: There are checkpoints and all of them are damaged.
    """
    found = complete_checkpoints(run)
    for folder in reversed(found):
        damage = _damage(folder)
        if damage is None:
            return folder
        report(f"{folder} is damaged ({damage}); trying the one before it")
    if found:
        raise UserError(f"{run}/checkpoints: all {len(found)} checkpoints are damaged; move them away to start again")
    return None


def _describe(folder: Path) -> dict[str, dict]:
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        listed = dict(json.loads((folder / MANIFEST).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    found = _describe(folder)
    for name, record in listed.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != record:
            return f"{name} is not what its manifest says"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Ask the system to bring a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
