"""Starts training processes through the command line, kills them, and compares what they leave.

A black box: only the command's options, exit statuses, standard error and the run folder's files are used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .slowed.sitecustomize import ENVIRONMENT_NAME

ROOT = Path(__file__).parents[2]
SLOWED = Path(__file__).with_name("slowed")
RECIPE = ROOT / "recipes" / "survival.yaml"
MANIFEST = "manifest.json"
PATIENCE_SECONDS = 120.0  # longer than anything may take, on a busy machine too
POLL_SECONDS = 0.004

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "head_dim": 8,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class Job:
    """What is trained: the recipe, a prepared folder, and settings that replace the recipe's by dotted name."""

    data: Path
    settings: dict[str, object]
    recipe: Path = RECIPE

    def arguments(self, run: Path) -> list[str]:
        """The command that starts this run or goes on with it."""
        options = [
            f"--{name}={value if isinstance(value, str) else json.dumps(value)}"
            for name, value in self.settings.items()
        ]
        files = ["--config", str(self.recipe), "--data", str(self.data), "--out", str(run)]
        return ["train", *files, "--resume", *options]

    def but(self, **settings) -> Job:
        """The same with other settings; a dot in a name is written as two underscores."""
        changed = {name.replace("__", "."): value for name, value in settings.items()}
        return Job(self.data, {**self.settings, **changed}, self.recipe)


def tiny_job(data: Path, **settings) -> Job:
    """A run of a second or two that saves often: a player of some thousand weights, judged by the recipe's critic."""
    tiny = {
        "player.settings": TINY,
        "optim.name": "adamw",
        "optim.learning_rate": 0.01,
        "optim.warmup_steps": 5,
        "block_size": 16,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "steps": 30,
        "eval_every_steps": 9,
        "eval_windows": 8,
        "log_every_steps": 3,
        "checkpoint_every_steps": 3,
        "keep_last": 2,
        "keep_every": None,
        "tensorboard": False,
        "precision": "fp32",
        "device": "cpu",
    }
    return Job(data, tiny).but(**settings)


# --- processes -------------------------------------------------------------------------------------------------------


class Attempt:
    """One life of a run: a process that leads a session of its own."""

    def __init__(self, pid: int, poll: Callable[[], int | None], log: Path):
        self.pid, self._poll, self._log, self._status = pid, poll, log, None

    def poll(self) -> int | None:
        """None while it lives, then its exit status, or minus the signal that ended it."""
        if self._status is None:
            self._status = self._poll()
        return self._status

    def wait(self, seconds: float = PATIENCE_SECONDS) -> int:
        """Its exit status; an error if it takes longer."""
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
                raise AssertionError(f"still running after {seconds:.0f} seconds:\n{self.errors[-2000:]}")
            time.sleep(POLL_SECONDS)
        return self.poll()

    def wait_for(
        self, condition: Callable[[], object], seconds: float = PATIENCE_SECONDS, pause: float = POLL_SECONDS
    ) -> bool:
        """Wait until ``condition()`` holds; whether it did while the process lived."""
        end = time.monotonic() + seconds
        while not condition():
            if self.poll() is not None or time.monotonic() > end:
                return bool(condition())
            time.sleep(pause)
        return True

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the whole group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def kill(self) -> int:
        """End the whole group at once; the exit status, which is a good one if it was faster."""
        self.send(signal.SIGKILL)
        return self.wait()

    @property
    def errors(self) -> str:
        """What it wrote to standard error."""
        return self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""


@dataclass(frozen=True)
class SlowCall:
    """The call to slow down; slowed/sitecustomize.py says how."""

    folder: Path
    only: str
    number: int
    after: bool
    seconds: float
    trace: Path
    marker: Path

    @property
    def as_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), default=str)

    @property
    def calls(self) -> list[str]:
        """What was counted so far: the call's name and the path it touches."""
        return self.trace.read_text(encoding="utf-8").splitlines() if self.trace.exists() else []


def environment(slow: SlowCall | None = None, **more: str) -> dict[str, str]:
    """One thread for each process, and waiting threads that leave the processor alone."""
    values = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    if slow is not None:
        values[ENVIRONMENT_NAME] = slow.as_json
        path.insert(0, str(SLOWED))
    return {**values, "PYTHONPATH": os.pathsep.join(path), **more}


class Launcher:
    """Starts attempts: forked from a zygote, or executed afresh. Use as a context manager.

    Args:
        scratch: A folder for logs and markers.
    """

    def __init__(self, scratch: Path):
        self.scratch, self._count, self._started = scratch, 0, []
        self.scratch.mkdir(parents=True, exist_ok=True)
        command, began = [sys.executable, "-m", "tests.survival.zygote"], time.monotonic()
        self._zygote = subprocess.Popen(
            command, cwd=ROOT, env=environment(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert "ready" in json.loads(self._zygote.stdout.readline() or "{}"), "the zygote did not start"
        self.import_seconds = time.monotonic() - began

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_) -> None:
        for attempt in self._started:
            if attempt.poll() is None:
                attempt.kill()
        self._zygote.stdin.close()
        self._zygote.wait(PATIENCE_SECONDS)
        self._zygote.stdout.close()

    def fork(self, arguments: Sequence[str], slow: SlowCall | None = None) -> Attempt:
        """``avatarl ARGUMENTS`` in a fork of the zygote."""
        log = self._new_log()
        slow_as_dict = None if slow is None else json.loads(slow.as_json)
        pid = self._ask({"start": list(arguments), "log": str(log), "slow": slow_as_dict})["pid"]
        return self._remember(Attempt(pid, lambda: self._ask({"poll": pid})["status"], log))

    def execute(self, arguments: Sequence[str], slow: SlowCall | None = None) -> Attempt:
        """``python -m avatarl ARGUMENTS`` in a new process."""
        return self.run_command(["-m", "avatarl", *arguments], slow)

    def run_command(self, arguments: Sequence[str], slow: SlowCall | None = None) -> Attempt:
        """``python ARGUMENTS`` in a new process."""
        log = self._new_log()
        with log.open("ab") as errors:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=environment(slow),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
        return self._remember(Attempt(process.pid, process.poll, log))

    def slow_call(
        self, folder: Path, number: int, after: bool = False, only: str = "", seconds: float = PATIENCE_SECONDS
    ) -> SlowCall:
        """The ``number``-th call of a process that changes files of ``folder`` with ``only`` in their path."""
        self._count += 1
        stem = self.scratch / f"slow-{self._count:04d}"
        return SlowCall(folder, only, number, after, seconds, stem.with_suffix(".trace"), stem.with_suffix(".marker"))

    def _ask(self, request: dict) -> dict:
        self._zygote.stdin.write(json.dumps(request) + "\n")
        self._zygote.stdin.flush()
        return json.loads(self._zygote.stdout.readline())

    def _new_log(self) -> Path:
        self._count += 1
        return self.scratch / f"attempt-{self._count:04d}.log"

    def _remember(self, attempt: Attempt) -> Attempt:
        self._started = [one for one in self._started if one.poll() is None] + [attempt]
        return attempt


# --- what lies in a run folder ---------------------------------------------------------------------------------------


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path.parent for path in run.glob(f"checkpoints/step-*/{MANIFEST}"))


def newest_step(run: Path) -> int | None:
    """The step of the newest complete checkpoint."""
    found = checkpoints(run)
    return int(found[-1].name.removeprefix("step-")) if found else None


def metrics(run: Path) -> list[dict]:
    """The lines of metrics.jsonl; a torn last line, which a killed process may leave, is left out."""
    path = run / "metrics.jsonl"
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def last_step(run: Path) -> int:
    """The last step that metrics.jsonl has a line of; 0 when there is none."""
    return max((line["step"] for line in metrics(run)), default=0)


def differences(run: Path, reference: Path, in_background: bool = False) -> list[str]:
    """How a finished run differs from the uninterrupted one, in a line each; nothing but clocks may differ.

    Compared are the files that are there, every model's bytes, every line of metrics, and the checkpoints' tensors.
    Checkpoints ``in_background`` are left out where one is still being written, so that which ones are there depends on
    time; those that both runs have are compared.
    """
    ours, theirs = files(run), files(reference)
    if in_background:
        unlike = {path.name for path in checkpoints(run)} ^ {path.name for path in checkpoints(reference)}
        ours, theirs = (
            {name for name in names if not any(f"checkpoints/{folder}/" in name for folder in unlike)}
            for names in (ours, theirs)
        )
    found = [f"{name} is left over" for name in sorted(ours - theirs)]
    found += [f"{name} is missing" for name in sorted(theirs - ours)]
    found += [f"{name} is an empty folder" for name in sorted(empty_folders(run) - empty_folders(reference))]
    for name in sorted(ours & theirs):
        if not same_content(run / name, reference / name):
            found.append(f"{name} differs")
    required = {"final/model.safetensors", "player/model.safetensors", "metrics.jsonl"}
    return found + [f"{name} was never written" for name in sorted(required - ours)]


def files(run: Path) -> set[str]:
    """Every file of a run by its path, without TensorBoard's, whose names hold time and process."""
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if not path.is_dir() or path.is_symlink()}
    return {name for name in names if not name.startswith("tensorboard/") and name != ".lock"}


def empty_folders(run: Path) -> set[str]:
    return {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_dir() and not any(path.iterdir())}


def same_content(path: Path, other: Path) -> bool:
    """Whether two files hold the same, apart from clocks and the run's own place."""
    return same(content(path), content(other))


def content(path: Path) -> object:
    """What of a file must not depend on kills."""
    if path.name in ("environment.json", MANIFEST):
        return None  # when and by which command it was started; digests of files that are compared themselves
    if path.suffix == ".safetensors":
        return tensors(path)
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.name == "config.yaml":
        return [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("out:")]
    if path.name == "README.md":
        own = ("# ", "- name: ", "| made with ")  # the run folder's name, twice, and the revision it was started by
        return [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith(own)]
    return path.read_bytes()


def tensors(path: Path) -> tuple[dict, bytes]:
    """A safetensors file's header and the bytes of its tensors; the order of metadata in the header is arbitrary."""
    file = path.read_bytes()
    end = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:end]), file[end:]


CLOCKS = ("seconds", "unlogged_seconds", "tokens_per_second")


def same(a, b) -> bool:
    """Whether two nested values are equal to the last bit, clocks aside."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key not in CLOCKS)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)
