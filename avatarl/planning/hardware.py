"""What devices hold and how fast they multiply: a table of well-known GPUs, and measurements of what is at hand."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from avatarl.device import pick_device, pick_precision
from avatarl.errors import UserError, nearest_name

GIB = 2**30
# What a process holds beside its tensors, roughly: Python with its libraries; on a GPU the context, the workspaces of
# libraries and what the allocator cannot use.
OUTSIDE_TENSORS = {"cpu": GIB // 2, "cuda": GIB}


@dataclass(frozen=True)
class Hardware:
    """One device.

    Args:
        name: As the user calls it.
        kind: ``cpu`` or ``cuda``.
        memory: What a process may use, bytes.
        flops: Floating-point operations per second of large matrix products, by precision (bf16, fp32). Without bf16
            where the device does not multiply it natively.
        source: Where ``flops`` come from, for the reader of a plan.
    """

    name: str
    kind: str
    memory: int
    flops: dict[str, float]
    source: str

    @property
    def outside_tensors(self) -> int:
        """Bytes, roughly, that a process holds in this memory beside its tensors."""
        return OUTSIDE_TENSORS[self.kind]

    def precision(self, wanted: str) -> str:
        """``bf16`` or ``fp32``; ``auto`` is bf16 where it is native, as in training."""
        return wanted if wanted != "auto" else "bf16" if "bf16" in self.flops else "fp32"


def _gpu(name: str, gib: float, bf16: float | None, fp32: float) -> Hardware:
    flops = {"bf16": bf16, "fp32": fp32}
    peak = {precision: 1e12 * tera for precision, tera in flops.items() if tera is not None}
    return Hardware(name, "cuda", int(gib * GIB), peak, "NVIDIA's data sheet")


# GiB as PyTorch reports them, a little under the name's gigabytes; dense TFLOP/s from NVIDIA's data sheets and, for the
# GeForce cards, the whitepapers of GA102 and AD102 (bf16 summed in fp32). Products in float32 do not use TF32 unless
# asked to, and these runs do not ask. The H100 and H200 are the SXM ones.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("H200", 139.8, bf16=989, fp32=67),
        _gpu("H100", 79.1, bf16=989, fp32=67),
        _gpu("H100-PCIe", 79.1, bf16=756, fp32=51),
        _gpu("A100-80", 79.1, bf16=312, fp32=19.5),
        _gpu("A100-40", 39.4, bf16=312, fp32=19.5),
        _gpu("L40S", 44.4, bf16=362, fp32=91.6),
        _gpu("A10", 22.0, bf16=125, fp32=31.2),
        _gpu("L4", 22.0, bf16=121, fp32=30.3),
        _gpu("RTX-4090", 23.5, bf16=165.2, fp32=82.6),
        _gpu("RTX-3090", 23.6, bf16=71, fp32=35.6),
        _gpu("T4", 14.6, bf16=None, fp32=8.1),
    )
}


def find_hardware(name: str, precision: str = "auto") -> Hardware:
    """The GPU of that name in the table, or what is at hand under ``auto``, ``cpu`` or ``cuda``, measured.

    Measuring takes about a second and is done in the precision that ``precision`` means there.

    Raises:
        UserError: There is no such device.
    """
    by_small_name = {key.lower(): gpu for key, gpu in GPUS.items()}
    if name.lower() in by_small_name:
        return by_small_name[name.lower()]
    if name.partition(":")[0] not in ("auto", "cpu", "cuda"):
        known = ("auto", "cpu", "cuda", *GPUS)
        raise UserError(f"device is {name!r}; expected one of {', '.join(known)}{nearest_name(name, known)}")
    device = pick_device(name)
    taken = pick_precision(precision, device)
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = available_memory()
    flops = {taken: measure_flops(device, taken)}
    return Hardware(str(device), device.type, memory, flops, "a large product, timed now")


def available_memory() -> int:
    """Bytes of this machine's memory that a new process could have; all of it where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def measure_flops(device: torch.device, precision: str, seconds: float = 1.0) -> float:
    """Floating-point operations per second of a large matrix product: the fastest of those that fit in ``seconds``."""
    width = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    matrix = torch.ones(width, width, device=device, dtype=dtype)
    fastest, end = float("inf"), time.perf_counter() + seconds
    for _ in range(2):  # the first product pays for what a library sets up
        matrix @ matrix
    while fastest == float("inf") or time.perf_counter() < end:
        _wait(device)
        start = time.perf_counter()
        matrix @ matrix
        _wait(device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * width**3 / fastest


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
