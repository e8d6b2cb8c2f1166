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
from typing import Any

from avatarl.durable import flush, remove_folder, replace_folder
from avatarl.errors import RunFailed, UserError
from avatarl.training.processes import Processes

from .tensors import Held, save_part

MANIFEST, STATE, CHECKPOINTS = "manifest.json", "state.json", "checkpoints"
PATIENCE_SECONDS = 30
STEP_FOLDER = re.compile(r"step-(\d{8,})")


class Checkpoints:
    """The checkpoints of one run, and the writing of new ones, by all of its processes. Use as a context manager."""

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
        self._folder, self._identity = run / CHECKPOINTS, identity
        self._keep_last, self._keep_every = keep_last, keep_every
        self._processes, self._writers = processes, processes.apart()
        self._background = _BackgroundWriter() if in_background else None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        """After an error, let what is being written be finished; other processes may be gone, so not for ever."""
        if kind is not None and self._background:
            self._background.join(None if self._processes.count == 1 else PATIENCE_SECONDS)

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Held]], state: dict, is_last: bool = False) -> bool:
        """Write the checkpoint after ``step`` optimiser steps and remove those no longer to be kept.

        Checkpoints of later steps go too: the run fell back behind them because they are not good.

        Args:
            step: The number of steps.
            tensors: By file and name. Each process writes what it holds, or the main one alone where that is all.
            state: What fits into JSON.
            is_last: In the background, whether to wait until it is there.

        Returns:
            False where one is still being written in the background, and this one was left out for it.

        Raises:
            OSError, SafetensorError: It cannot be written, or, in the background, the one before could not be; complete
                ones are untouched.
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
        """Whether no process is writing any more; nobody waits for a thread that may wait for another process."""
        while (worst := self._processes.largest(self._background.state)) == BUSY and waits:
            time.sleep(0.02)
        if worst == FAILED:
            raise self._background.error or RunFailed("another process could not write its part of a checkpoint")
        return worst == FREE

    def _write(self, step: int, tensors: Mapping[str, Mapping[str, Held]], state: dict) -> None:
        writers = self._writers
        if not writers.is_main:
            partial = Path(writers.from_main(None))
            writers.gather(self._write_tensors(partial, tensors) if is_divided(tensors) else {})
            writers.from_main(None)  # nobody goes on before it is there
            return

        def fill(partial: Path) -> None:
            writers.from_main(str(partial))
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
        writers.from_main(True)

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
        """Remove what is not to be kept now that the checkpoint of step ``newest`` is there.

        A folder whose manifest does not say that it is a checkpoint may be somebody's, and stays.
        """
        steps = [step for step in steps_found(self._folder) if is_complete(step_folder(self._folder, step))]
        kept = [step for step in steps if step <= newest][-self._keep_last :]
        for step in steps:
            is_kept_for_good = self._keep_every and step % self._keep_every == 0 and step <= newest
            if step not in kept and not is_kept_for_good:
                remove_folder(step_folder(self._folder, step))


def is_divided(tensors: Mapping[str, Mapping[str, Held]]) -> bool:
    """Whether processes hold parts."""
    return any(held.rows.shape != held.shape for named in tensors.values() for held in named.values())


FREE, BUSY, FAILED = 0, 1, 2  # states of a writer; the larger one matters more


class _BackgroundWriter:
    """One piece of writing at a time, on another thread."""

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
            except BaseException as error:  # to be raised on the thread that trains
                self.error = error

        # A daemon: a process that ends does not wait for it, and leaves an unfinished checkpoint, which is none.
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
    left: Mapping[str, str] | None = None,
) -> Path | None:
    """The newest checkpoint that is as its manifest says; None when none was ever completed.

    Args:
        run: The run folder.
        report: Is told, in a line each, of those that are not good.
        accepted: Identities of the run; a checkpoint of another is not good (None: none is asked for).
        left: SHA-256 of the manifests of those that the finished run has left, by folder; whoever writes another one
            can write matching sums (None: it has not finished).

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
            and left is not None
            and describe(checkpoint / MANIFEST)["sha256"] != left.get(checkpoint.name)
        ):
            damage = "the run finished with another one"
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
    if checkpoint.name != step_folder(checkpoint, manifest["step"]).name:
        return f"it is the one of step {manifest['step']}"
    for name, record in manifest["files"].items():
        path = checkpoint / name
        try:
            if Path(name).name != name or not path.exists():
                return f"{name} is missing"
            if not path.is_file() or path.stat().st_size != record.get("bytes") or describe(path) != record:
                return f"{name} is not what its manifest says"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def is_complete(checkpoint: Path) -> bool:
    """Whether a manifest says that this is a checkpoint; whether it is as that says, :func:`damage_of` tells."""
    try:
        return step_folder(checkpoint.parent, read_manifest(checkpoint)["step"]) == checkpoint
    except (OSError, ValueError):
        return False


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
    records = list(manifest["files"].values())
    is_ours = isinstance(manifest["step"], int) and all(isinstance(record, dict) for record in records)
    if text.encode() != content or not is_ours:
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
