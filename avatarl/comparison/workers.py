"""Several processes of avatarl at once, a GPU or some cores each."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from avatarl.durable import open_own, refuse_link, replace_file
from avatarl.errors import RunFailed, RunStopped
from avatarl.lock import RunLock
from avatarl.process import PARENT

from .progress import Job, has_diverged

POLL_SECONDS = 0.2
SAVE_SECONDS = 30.0  # that a run which was asked to stop may take, before another process goes on with it
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # the last one of a terminal that is gone


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen
    log: IO[bytes]
    began: float
    slot: int


class Workers:
    """Runs jobs, so many at once. Use as a context manager: what still runs in the end is asked to stop.

    A run that is stopped leaves a checkpoint and goes on from it when its job is given again.
    """

    def __init__(self, out: Path, count: int | None, say: Callable[[str], None]):
        self._out, self._say = out, say
        self._gpus = _visible_gpus()
        self._cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.count = count or len(self._gpus) or self._cores
        self._running: list[_Running] = []
        self._before: dict[int, object] = {}
        self._ended: set[Path] = set()  # what processes made that ended well
        self._signum: int | None = None  # only noted: raised in the middle of a start, it would lose that process

    def __enter__(self) -> Workers:
        heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # not under nohup
        self._before = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        for number in self._before:  # a second signal while the runs save what they have would lose it
            signal.signal(number, signal.SIG_IGN)
        for running in self._running:
            running.process.terminate()
        for running in self._running:
            running.process.wait()
            running.log.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None:
            self._stop_if_asked()

    def _note(self, signum: int, _frame) -> None:
        self._signum = signum

    def _stop_if_asked(self) -> None:
        if self._signum is not None:
            reason = "stopped; the runs that were going on have saved what they had, and the same command goes on"
            raise RunStopped(self._signum, reason)

    def work_until(self, look: Callable[[], list[Job]]) -> None:
        """Do what ``look`` finds missing, and look again whenever a process ends, until nothing is.

        Raises:
            RunFailed: A process failed; the others were stopped.
            RunStopped: SIGTERM, SIGINT or SIGHUP; the runs saved what they had.
        """
        while missing := look():
            for job in missing:
                if job.folder in self._ended:
                    raise RunFailed(f"{job.name} ended well and left nothing to go on with ({self._log_of(job)})")
            running = [each.job.folder for each in self._running]
            waiting = [job for job in missing if job.folder not in running]
            for job in waiting[: self.count - len(self._running)]:
                self._start(job)
            self._wait_for_one(len(missing))

    def _start(self, job: Job) -> None:
        taken = {running.slot for running in self._running}
        slot = next(number for number in range(self.count) if number not in taken)
        if job.recipe is not None:
            recipe = Path(job.arguments[job.arguments.index("--config") + 1])
            recipe.parent.mkdir(parents=True, exist_ok=True)
            replace_file(recipe, job.recipe.as_yaml())
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        if job.recipe is not None and job.folder.is_dir():
            with RunLock(job.folder, SAVE_SECONDS):  # a comparison that was killed has left it: it saves what it has
                pass
        path = self._log_of(job)
        path.parent.mkdir(parents=True, exist_ok=True)
        refuse_link(path)
        if path.exists():
            earlier = (path.with_suffix(f".{number}.log") for number in itertools.count(1))
            path.rename(next(each for each in earlier if not each.exists()))
        log = open(open_own(path, os.O_WRONLY | os.O_APPEND), "ab")
        process = subprocess.Popen(
            [sys.executable, "-m", "avatarl", *job.arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=self._environment(slot),
            start_new_session=True,  # a terminal's Ctrl-C comes to this process, which passes one signal on
        )
        self._running.append(_Running(job, process, log, time.monotonic(), slot))

    def _environment(self, slot: int) -> dict[str, str]:
        environment = {**os.environ, PARENT: str(os.getpid())}
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[slot % len(self._gpus)]
        environment.setdefault("OMP_NUM_THREADS", str(max(1, self._cores // self.count)))
        return environment

    def _wait_for_one(self, missing: int) -> None:
        self._stop_if_asked()
        while all(running.process.poll() is None for running in self._running):
            time.sleep(POLL_SECONDS)
            self._stop_if_asked()
        for running in [each for each in self._running if each.process.poll() is not None]:
            self._running.remove(running)
            running.log.close()
            status, job = running.process.returncode, running.job
            if status and not has_diverged(job.folder):
                log, last = self._log_of(job), _last_line(self._log_of(job))
                try:
                    with log.open("a") as words:
                        words.write(f"ended with status {status}\n")
                except OSError as error:  # and so the reason may be missing
                    last += f" (its log cannot be written: {error.strerror})"
                raise RunFailed(f"{job.name} ended with status {status}: {last} ({log})")
            self._ended.add(job.folder)
            seconds = time.monotonic() - running.began
            state = "gave up" if status else _last_line(self._log_of(job))
            self._say(f"{job.name}: {state} ({seconds:,.0f} s; {missing - 1} more known to be missing)")

    def _log_of(self, job: Job) -> Path:
        return self._out / "logs" / f"{job.name.replace('/', '-')}.log"


def _visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "said nothing"
