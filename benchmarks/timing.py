"""What every benchmark here does: time alternatives side by side, measure their memory, write rows down.

An alternative is something with a name that ``build(name, case)`` makes ready to be called. A case is a shape, a dtype,
a device: whatever the benchmark compares its alternatives at.
"""

from __future__ import annotations

import csv
import ctypes
import dataclasses
import functools
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

HERE = Path(__file__).parent
RESULTS = HERE / "results"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MIB = 2**20
# What an alternative may die of without taking the others along; out of memory is a RuntimeError.
FAILURES = (ImportError, RuntimeError, ValueError)


class Ready(NamedTuple):
    """An alternative, its inputs made."""

    call: Callable[[], object]
    warm_up: Callable[[], object]  # the same for small inputs: what a process does once in its life is then done
    note: str = ""


Build = Callable[[str, object], Ready]


@dataclass
class Measured:
    """What was seen of one alternative. Without ``seconds`` the note says why."""

    seconds: list[float] = field(default_factory=list)
    peak_mib: float | None = None
    note: str = ""

    def __str__(self) -> str:
        times = "{n:4} × {median_ms:10.4g} ms".format(**self.columns()) if self.seconds else " " * 19
        peak = "" if self.peak_mib is None else f"{self.peak_mib:10,.0f} MiB"
        return f"{times} {peak} {self.note}".rstrip()

    def columns(self) -> dict[str, object]:
        """The columns that every record has: milliseconds and MiB, empty where nothing was measured."""
        p20, median, p80 = np.quantile(self.seconds, (0.2, 0.5, 0.8)) * 1e3 if self.seconds else (None,) * 3
        times = {"n": len(self.seconds), "median_ms": median, "p20_ms": p20, "p80_ms": p80}
        return {**times, "peak_mib": self.peak_mib, "note": self.note}


def measure(
    build: Build, names: Sequence[str], cases: Sequence, device: str, seconds: float, memory_of: Iterable[str] = ()
) -> Iterator[tuple[object, dict[str, Measured]]]:
    """Memory first, then the times of each case, in about ``seconds`` altogether.

    ``memory_of`` are the names whose memory is measured on a CPU, where it takes a process of its own, as far as half
    the time allows; on CUDA it is measured of all. Every alternative is called at least twice in each case however long
    that takes: to warm up, and for its time.
    """
    start = time.monotonic()
    on_cpu = {}
    for name in memory_of if device == "cpu" else ():
        if time.monotonic() < start + seconds / 2:
            on_cpu[name] = resident_peaks(build, name, cases)
    for number, case in enumerate(cases):
        measured = {name: Measured() for name in names}
        calls = {}
        for name, result in measured.items():
            try:
                calls[name], _, result.note = build(name, case)
            except FAILURES as error:
                result.note = one_line(error)
        left = max(0.0, start + seconds - time.monotonic()) / (len(cases) - number)
        for name, times in interleave(calls, left, device).items():
            if isinstance(times, str):
                measured[name].note = times
                continue
            measured[name].seconds = times
            if name in on_cpu:
                measured[name].peak_mib = on_cpu[name][number]
            elif device == "cuda":
                measured[name].peak_mib = peak_on_cuda(calls[name])
        calls.clear()
        yield case, measured


def interleave(calls: Mapping[str, Callable[[], object]], seconds: float, device: str) -> dict[str, list[float] | str]:
    """Seconds of each call, taken in turns until the time is up, each at least once; what went wrong where one fails.

    Turns are what makes noise common to all: a machine that slows down does so for every alternative. Earlier names
    get the remainder of the time, so name first what matters most.
    """
    end = time.perf_counter() + seconds
    results: dict[str, list[float] | str] = {}
    for name, call in calls.items():
        try:
            call()
            results[name] = []
        except FAILURES as error:
            results[name] = one_line(error)
    working = [name for name, times in results.items() if isinstance(times, list)]
    is_first_round = True
    while working and (is_first_round or time.perf_counter() < end):
        for name in working:
            if not is_first_round and time.perf_counter() >= end:
                break
            synchronise(device)
            start = time.perf_counter()
            calls[name]()
            synchronise(device)
            results[name].append(time.perf_counter() - start)
        is_first_round = False
    return results


def synchronise(device: str) -> None:
    """Wait until the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


# --- memory --------------------------------------------------------------------------------------------------------


def peak_on_cuda(call: Callable[[], object]) -> float:
    """Peak memory (MiB) of a call above what was held before it, as the allocator counts."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def resident_peaks(build: Build, name: str, cases: Sequence) -> list[float | None]:
    """Peak resident memory (MiB) of one call in each case above what was held before it; None where none was read.

    In a process of the alternative's own: what others left in the allocator would hide part of it. The process is
    spawned, since a forked one would inherit this one's threads in no state to be used. Its allocator maps every large
    buffer by itself, as it would not in training: resident memory is then what is in use, not what the heap has kept.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(MIB)  # read when a process starts
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(peaks_here, build, name, cases).result()
        except (BrokenProcessPool, *FAILURES) as error:
            print(f"no memory figure of {name}: {one_line(error)}", file=sys.stderr)
            return [None] * len(cases)


def peaks_here(build: Build, name: str, cases: Sequence) -> list[float | None]:
    """What :func:`resident_peaks` says, of this process."""
    peaks = []
    for case in cases:
        call, warm_up, _ = build(name, case)
        warm_up()
        try:
            ctypes.CDLL(None).malloc_trim(0)  # freed buffers that the allocator keeps would be used again, unseen
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
            before = _process_status_mib("VmRSS")
            call()
            peaks.append(_process_status_mib("VmHWM") - before)
        except (OSError, AttributeError):  # not Linux, or another C library
            peaks.append(None)
    return peaks


def _process_status_mib(entry: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry)) / 1024


# --- the record ----------------------------------------------------------------------------------------------------


@functools.cache  # the rows of one command share their date
def circumstances(device: str) -> dict[str, object]:
    """When, what and where: date, revision, device and versions."""
    from avatarl.run_dir.environment import describe_environment

    found = describe_environment(torch.device(device), precision="", process_count=1, identity={"data": ""})
    return {
        "date": found["started"],
        "revision": revision(),
        "device": found["device"],
        "threads": found["threads"],
        "python": found["python"],
        "torch": torch.__version__,
        "triton": version_of("triton"),
    }


def revision() -> str:
    """The source tree's revision, with ``-dirty`` if its code was changed; what benchmarks write does not count."""
    described = _git("describe", "--always")
    written = (f":(exclude)benchmarks/{name}" for name in ("results", "README.md", "*.png"))
    return described + ("-dirty" if _git("status", "--porcelain", "--", ".", *written) else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(HERE.parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git
        return ""


def version_of(package: str) -> str:
    """Its version, or nothing where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def record(path: Path, case: object, measured: Mapping[str, Measured], **more: Callable[[str], object]) -> None:
    """Append a row for each alternative to a CSV file: where and when, the case, ``more`` columns, what was measured.

    Raises:
        ValueError: The file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    known = read(path)
    settings = dataclasses.asdict(case)
    where = {**circumstances(settings.pop("device")), **settings}
    rows = [
        {**where, "alternative": name, **{column: of(name) for column, of in more.items()}, **seen.columns()}
        for name, seen in measured.items()
    ]
    if known and list(known[0]) != list(rows[0]):
        raise ValueError(f"{path} has the columns {list(known[0])}; expected {list(rows[0])}")
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        if not known:
            writer.writeheader()
        writer.writerows({name: _short(value) for name, value in row.items()} for row in rows)
    for name, seen in measured.items():
        print(f"{name:<42} {seen}", flush=True)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _short(value: object) -> object:
    return f"{value:.5g}" if isinstance(value, float) else value


def one_line(error: Exception) -> str:
    """What an error says, shortly."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:120]
