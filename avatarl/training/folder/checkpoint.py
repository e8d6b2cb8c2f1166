"""Checkpoints that are whole or absent: written beside, flushed, renamed; the manifest is written last.

checkpoints/step-00000500/
  player.safetensors   optimiser.safetensors   snapshot.safetensors (ppo)   state.json   manifest.json
  (divided players: player-00001-of-00008.safetensors …, one of each kind for every process)
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from avatarl.errors import UserError

from ..processes import Processes
from .durable import flush, remove_folder, replace_folder
from .tensors import Held, save_part

MANIFEST, STATE, CHECKPOINTS = "manifest.json", "state.json", "checkpoints"
STEP_FOLDER = re.compile(r"step-(\d{8,})")


class Checkpoints:
    """The checkpoints of one run, and the writing of new ones, by all of its processes."""

    def __init__(
        self,
        run: Path,
        identity: Mapping[str, Any],
        processes: Processes,
        keep_last: int,
        keep_every: int | None = None,
        in_background: bool = False,
    ):
        """
        Args:
            run: The run folder.
            identity: What the run is: goes into each manifest.
            processes: Those of the run; each of them has to make this object and to call :meth:`save`.
            keep_last: How many of the newest to keep.
            keep_every: Also keep those of steps divisible by this.
            in_background: Write from a copy while training goes on.
        """
        self._folder = run / CHECKPOINTS
        self._identity, self._processes = identity, processes
        self._keep_last, self._keep_every = keep_last, keep_every
        self._writer = _BackgroundWriter() if in_background else None
        # What processes say to each other while they write must not mix with what the loop says meanwhile.
        self._group = dist.new_group(backend="gloo") if processes.count > 1 else None

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Held]], state: dict, must_wait: bool = False) -> bool:
        """Write the checkpoint after ``step`` optimiser steps and remove those no longer to be kept.

        Checkpoints of later steps go too: the run fell back behind them because they are damaged.

        Args:
            step: The number of steps.
            tensors: By file and name. Each process writes what it holds, or the main one alone where that is all.
            state: What fits into JSON.
            must_wait: In the background, whether to wait for the one before and for this one too.

        Returns:
            False where one is still being written in the background, and this one was left out for it.

        Raises:
            OSError, SafetensorError: It cannot be written; those before are untouched. In the background, the error of
                the one before.
        """
        if self._writer is None:
            self._write(step, tensors, state)
            return True
        must_wait = must_wait or bool(self._keep_every and step % self._keep_every == 0)
        if not must_wait and self._processes.largest(self._writer.is_busy):
            return False
        self._writer.wait()
        copies = {part: {name: held.copy() for name, held in named.items()} for part, named in tensors.items()}
        copied_state = json.loads(json.dumps(state))
        self._writer.start(lambda: self._write(step, copies, copied_state))
        if must_wait:
            self._writer.wait()
        return True

    def wait(self) -> None:
        """Until nothing is being written; raises the error it ended with."""
        if self._writer:
            self._writer.wait()

    def _write(self, step: int, tensors: Mapping[str, Mapping[str, Held]], state: dict) -> None:
        is_divided = any(held.rows.shape != held.shape for named in tensors.values() for held in named.values())
        if not self._processes.is_main:
            partial = Path(self._from_main(None))
            self._gather(self._write_tensors(partial, tensors, is_divided) if is_divided else {})
            self._from_main(None)  # nobody goes on before it is there
            return

        def fill(partial: Path) -> None:
            self._from_main(str(partial))
            files = self._write_tensors(partial, tensors, is_divided)
            (partial / STATE).write_text(json.dumps(state), encoding="utf-8")
            files[STATE] = describe(partial / STATE)
            for others in self._gather(files)[1:]:
                files |= others
            (partial / MANIFEST).write_text(manifest_text(step, files, self._identity), encoding="utf-8")

        if not self._folder.exists():
            self._folder.mkdir()  # its parent must be there, or the disk is gone
            flush(self._folder.parent)
        replace_folder(step_folder(self._folder, step), fill)
        self._forget(step)
        self._from_main(True)

    def _write_tensors(self, folder: Path, tensors: Mapping[str, Mapping[str, Held]], is_divided: bool) -> dict:
        rank, count = self._processes.rank, self._processes.count
        records = {}
        for part, named in tensors.items():
            name = f"{part}-{rank + 1:05d}-of-{count:05d}.safetensors" if is_divided else f"{part}.safetensors"
            save_part(folder / name, named)
            flush(folder / name)
            records[name] = describe(folder / name)
        return records

    def _forget(self, newest: int) -> None:
        """Remove what is not to be kept now that the checkpoint of step ``newest`` is there."""
        steps = steps_found(self._folder)
        kept = [step for step in steps if step <= newest][-self._keep_last :]
        for step in steps:
            is_kept_for_good = self._keep_every and step % self._keep_every == 0 and step <= newest
            if step not in kept and not is_kept_for_good:
                remove_folder(step_folder(self._folder, step))

    def _from_main(self, value: Any) -> Any:
        if self._group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group, device=torch.device("cpu"))
        return values[0]

    def _gather(self, value: dict) -> list[dict]:
        if self._group is None:
            return [value]
        values = [None] * self._processes.count
        dist.all_gather_object(values, value, group=self._group)
        return values


class _BackgroundWriter:
    """One piece of writing at a time, on another thread; its error is raised where the run next asks."""

    def __init__(self):
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def is_busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, write: Callable[[], None]) -> None:
        def run() -> None:
            try:
                write()
            except BaseException as error:  # to be raised on the thread that trains
                self._error = error

        # A daemon: a process that ends does not wait for it, and leaves an unfinished checkpoint, which is none.
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error


# --- reading ---------------------------------------------------------------------------------------------------------


def newest_good_checkpoint(
    run: Path, report: Callable[[str], None], accepted: Sequence[Mapping[str, Any]] | None = None
) -> Path | None:
    """The newest checkpoint that is as its manifest says; None when none was ever completed.

    Args:
        run: The run folder.
        report: Is told, in a line each, of those that are not good.
        accepted: Identities of the run; a checkpoint of another is not good (None: none is asked for).

    Raises:
        UserError: There are checkpoints and all of them are damaged.
    """
    folder = run / CHECKPOINTS
    steps = steps_found(folder)
    for step in reversed(steps):
        checkpoint = step_folder(folder, step)
        damage = damage_of(checkpoint)
        if damage is None and accepted is not None and read_manifest(checkpoint)["identity"] not in accepted:
            damage = "it is of another run"
        if damage is None:
            return checkpoint
        report(f"{checkpoint} is damaged ({damage}); trying the one before it")
    if steps:
        raise UserError(f"{folder}: all {len(steps)} checkpoints are damaged; move them away to start again")
    return None


def steps_found(folder: Path) -> list[int]:
    """The steps of what lies under a checkpoint's name, whole or damaged, in order."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(match[1]) for name in names if (match := STEP_FOLDER.fullmatch(name)))


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` optimiser steps lies."""
    return folder / f"step-{step:08d}"


def damage_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = read_manifest(checkpoint)
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError):
        return f"{MANIFEST} is not as it was written"
    if checkpoint.name != f"step-{manifest['step']:08d}":
        return f"it is the one of step {manifest['step']}"
    for name, record in manifest["files"].items():
        path = checkpoint / Path(name).name
        if not path.exists():
            return f"{name} is missing"
        if not path.is_file() or path.stat().st_size != record["bytes"] or describe(path) != record:
            return f"{name} is not what its manifest says"
    return None


def read_manifest(checkpoint: Path) -> dict:
    """A checkpoint's step, files and identity.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is not, to the byte, what :func:`manifest_text` writes.
    """
    path = checkpoint / MANIFEST
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file")
    content = path.read_bytes()
    try:
        manifest = json.loads(content)
        text = manifest_text(manifest["step"], manifest["files"], manifest["identity"])
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a manifest") from error
    if text.encode() != content:
        raise ValueError(f"{path} is not as it was written")
    return manifest


def manifest_text(step: int, files: Mapping[str, dict], identity: Mapping[str, Any]) -> str:
    """The manifest: what it lists, and a digest of that, so that damage to itself is seen too."""
    content = {"step": step, "identity": identity, "files": dict(sorted(files.items()))}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1) + "\n"


def describe(path: Path) -> dict[str, int | str]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
