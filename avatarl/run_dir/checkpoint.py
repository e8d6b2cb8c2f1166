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
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from avatarl.durable import flush, remove_folder, replace_folder
from avatarl.errors import RunFailed, UserError

from .tensors import Held, save_part

MANIFEST, STATE, CHECKPOINTS = "manifest.json", "state.json", "checkpoints"
PATIENCE_SECONDS = 30
STEP_FOLDER = re.compile(r"step-(\d{8,})")


class Processes(Protocol):
    """The processes that write together; avatarl.training.processes has them."""

    rank: int
    count: int
    is_main: bool

    def largest(self, number: int) -> int: ...
    def broadcast(self, value: Any) -> Any: ...
    def gather(self, value: Any) -> list[Any]: ...
    def for_another_thread(self) -> Processes: ...


class Checkpoints:
    """The checkpoints of one run, written by all of its processes. Use as a context manager."""

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
            identity: What identifies the run, for each manifest.
            processes: Those of the run; each of them makes this object and calls :meth:`save`.
            keep_last: How many of the newest to keep.
            keep_every: Also keep those of steps divisible by this.
            in_background: Write from a copy while training continues.
        """
        self._folder, self._identity = run / CHECKPOINTS, identity
        self._keep_last, self._keep_every = keep_last, keep_every
        self._processes, self._writers = processes, processes.for_another_thread()
        self._background = _BackgroundWriter() if in_background else None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        """After an error, wait for what is being written; not for ever, since other processes may be gone."""
        if kind is not None and self._background:
            self._background.join(None if self._processes.count == 1 else PATIENCE_SECONDS)

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Held]], state: dict, is_last: bool = False) -> bool:
        """Write the checkpoint after ``step`` optimiser steps and remove old ones.

        Checkpoints of later steps go too: the run fell back behind them because they are damaged.

        Args:
            step: The number of steps.
            tensors: By file and name. Each process writes its shards; the main one writes alone if it holds everything.
            state: What state.json holds.
            is_last: In the background, whether to wait until it is written.

        Returns:
            False if the previous one is still being written in the background; this one is skipped then.

        Raises:
            OSError, SafetensorError: This one, or in the background the previous one, cannot be written. Complete ones
                are untouched.
            RunFailed: Another process could not write its part.
        """
        if self._background is None:
            self._write(step, tensors, state)
            return True
        if not self._is_free(waits=is_last):
            return False
        if self._processes.is_main or is_divided(tensors):
            tensors = {part: {name: held.copy() for name, held in named.items()} for part, named in tensors.items()}
        copied_state = json.loads(json.dumps(state))
        self._background.start(lambda: self._write(step, tensors, copied_state))
        if is_last:
            self._is_free(waits=True)
        return True

    def _is_free(self, waits: bool) -> bool:
        """Whether no process is writing. It polls: a writer's thread may wait for another process."""
        while (worst := self._processes.largest(self._background.state)) == BUSY and waits:
            time.sleep(0.02)
        if worst == FAILED:
            raise self._background.error or RunFailed("another process could not write its part of a checkpoint")
        return worst == FREE

    def _write(self, step: int, tensors: Mapping[str, Mapping[str, Held]], state: dict) -> None:
        writers = self._writers
        if not writers.is_main:
            partial = Path(writers.broadcast(None))
            writers.gather(self._write_tensors(partial, tensors) if is_divided(tensors) else {})
            writers.broadcast(None)  # wait until it is there
            return

        def fill(partial: Path) -> None:
            writers.broadcast(str(partial))
            files = self._write_tensors(partial, tensors)
            (partial / STATE).write_text(json.dumps(state), encoding="utf-8")
            files[STATE] = describe(partial / STATE)
            for others in writers.gather(files)[1:]:
                files |= others
            (partial / MANIFEST).write_text(manifest_text(step, files, self._identity), encoding="utf-8")

        if not self._folder.exists():
            self._folder.mkdir()  # its parent must be there, or the disk is gone
            flush(self._folder.parent)
        replace_folder(step_folder(self._folder, step), fill)
        self._forget(step)
        writers.broadcast(True)

    def _write_tensors(self, folder: Path, tensors: Mapping[str, Mapping[str, Held]]) -> dict:
        number = f"-{self._writers.rank + 1:05d}-of-{self._writers.count:05d}" if is_divided(tensors) else ""
        records = {}
        for part, named in tensors.items():
            name = f"{part}{number}.safetensors"
            save_part(folder / name, named)
            flush(folder / name)
            records[name] = describe(folder / name)
        return records

    def _forget(self, newest: int) -> None:
        """Remove old checkpoints now that the one of step ``newest`` is there.

        A folder without a checkpoint's manifest may be the user's own, and stays.
        """
        steps = [step for step in steps_found(self._folder) if is_complete(step_folder(self._folder, step))]
        kept = [step for step in steps if step <= newest][-self._keep_last :]
        for step in steps:
            is_kept_for_good = self._keep_every and step % self._keep_every == 0 and step <= newest
            if step not in kept and not is_kept_for_good:
                remove_folder(step_folder(self._folder, step))


def is_divided(tensors: Mapping[str, Mapping[str, Held]]) -> bool:
    """Whether processes hold shards."""
    return any(held.rows.shape != held.shape for named in tensors.values() for held in named.values())


FREE, BUSY, FAILED = 0, 1, 2  # states of a writer; the larger one matters more


class _BackgroundWriter:
    """Runs one call at a time on another thread."""

    def __init__(self):
        self.error: BaseException | None = None
        self._thread: threading.Thread | None = None

    @property
    def state(self) -> int:
        if self.error is not None:
            return FAILED
        return BUSY if self._thread is not None and self._thread.is_alive() else FREE

    def start(self, write: Callable[[], None]) -> None:
        def run() -> None:
            try:
                write()
            except BaseException as error:  # raised later, on the thread that trains
                self.error = error

        # A daemon: a process that ends does not wait for it. An unfinished checkpoint has no manifest.
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def join(self, seconds: float | None) -> None:
        if self._thread:
            self._thread.join(seconds)


# --- reading ---------------------------------------------------------------------------------------------------------


def newest_good_checkpoint(
    run: Path,
    report: Callable[[str], None],
    accepted: Sequence[Mapping[str, Any]] | None = None,
    at_finish: Mapping[str, str] | None = None,
) -> Path | None:
    """The newest checkpoint that matches its manifest; None if none was ever completed.

    Args:
        run: The run folder.
        report: Gets one line for each damaged checkpoint.
        accepted: Identities of the run; a checkpoint with another one counts as damaged (None: any is accepted).
        at_finish: SHA-256 of the manifests of a finished run's checkpoints, by folder: somebody who replaces one can
            write a matching manifest (None: the run has not finished).

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
        if (
            damage is None
            and at_finish is not None
            and describe(checkpoint / MANIFEST)["sha256"] != at_finish.get(checkpoint.name)
        ):
            damage = "it was replaced after the run had finished"
        if damage is None:
            return checkpoint
        report(f"{checkpoint} is damaged ({damage}); trying the one before it")
    if steps:
        raise UserError(f"{folder}: all {len(steps)} checkpoints are damaged; move them away to start again")
    return None


def steps_found(folder: Path) -> list[int]:
    """The steps of all checkpoints, complete or not, in order."""
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
        return f"{MANIFEST} was changed"
    if checkpoint.name != step_folder(checkpoint, manifest["step"]).name:
        return f"it is of step {manifest['step']}"
    for name, record in manifest["files"].items():
        path = checkpoint / name
        try:
            if Path(name).name != name or not path.exists():
                return f"{name} is missing"
            if not path.is_file() or path.stat().st_size != record.get("bytes") or describe(path) != record:
                return f"{name} does not match its manifest"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint has its manifest; :func:`damage_of` compares the files with it."""
    try:
        return step_folder(checkpoint.parent, read_manifest(checkpoint)["step"]) == checkpoint
    except (OSError, ValueError):
        return False


def read_manifest(checkpoint: Path) -> dict:
    """A checkpoint's step, files and identity.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is not, byte for byte, what :func:`manifest_text` writes.
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
    records = list(manifest["files"].values())
    is_ours = isinstance(manifest["step"], int) and all(isinstance(record, dict) for record in records)
    if text.encode() != content or not is_ours:
        raise ValueError(f"{path} was changed")
    return manifest


def manifest_text(step: int, files: Mapping[str, dict], identity: Mapping[str, Any]) -> str:
    """The manifest's text, with a digest of its own content, so that damage to the manifest is seen too."""
    content = {"step": step, "identity": identity, "files": dict(sorted(files.items()))}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1) + "\n"


def describe(path: Path) -> dict[str, int | str]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
