"""The device, the precision and the place among several processes that a run computes with."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .errors import UserError

if TYPE_CHECKING:
    import torch


def launched_as() -> tuple[int, int, int]:
    """Return rank, number of processes and rank on this machine as ``torchrun`` sets them; 0, 1 and 0 without it.

    Raises:
        UserError: An environment variable holds something else.
    """
    found = []
    for name, alone in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        value = os.environ.get(name, "").strip() or alone
        if not value.isdecimal():
            raise UserError(f"{name} is {value!r} in the environment; expected a whole number, or nothing")
        found.append(int(value))
    rank, count, local_rank = found
    if count <= 1:
        return 0, 1, 0
    if rank >= count:
        raise UserError(f"RANK is {rank} in the environment, and WORLD_SIZE is {count}; expected a rank below it")
    return rank, count, local_rank


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device called ``name``; ``auto`` is CUDA where there is one, else the CPU.

    Each process of a machine with several CUDA devices takes the one of its ``local_rank``.

    Raises:
        UserError: There is no such device.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device is {name!r}, which cannot be used ({reason}); expected auto, cpu or cuda") from error
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """Return ``bf16`` or ``fp32``; ``auto`` is bf16 where the hardware has it: CUDA since Ampere, AMX, AVX512-BF16."""
    import torch

    if name != "auto":
        return name
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        known = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        native = known.get("amx_bf16", False) or known.get("avx512_bf16", False)
    return "bf16" if native else "fp32"


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor of the host to ``device`` without making the host wait."""
    # A GPU fetches from pinned memory by itself; a copy from other memory makes the host wait for its turn.
    source = tensor.pin_memory() if device.type == "cuda" else tensor
    return source.to(device, non_blocking=True)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this process holds."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
