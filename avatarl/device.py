"""Where a run computes, as which of how many processes, and in which precision."""

from __future__ import annotations

import os

import torch
from torch.distributed.tensor import DTensor

from avatarl.errors import UserError


def launched_as() -> tuple[int, int, int]:
    """Rank, number of processes and rank on this machine as ``torchrun`` says them; 0, 1 and 0 where it says nothing.

    Raises:
        UserError: What stands in the environment in their place is none.
    """
    found = []
    for name, alone in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        value = os.environ.get(name, "").strip() or alone
        if not value.isdecimal():
            raise UserError(f"{name} is {value!r} in the environment; expected a whole number, or that it is not set")
        found.append(int(value))
    rank, count, local_rank = found
    if count <= 1:
        return 0, 1, 0
    if rank >= count:
        raise UserError(f"RANK is {rank} in the environment, and WORLD_SIZE is {count}; expected a rank below it")
    return rank, count, local_rank


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device called ``name``; ``auto`` is CUDA where there is one, else the CPU.

    Of several CUDA devices each process of a machine has its own, that of its ``local_rank``.

    Raises:
        UserError: There is no such device.
    """
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
    """``bf16`` or ``fp32``; ``auto`` is bf16 where the device multiplies it: CUDA since Ampere, AMX, AVX512-BF16."""
    if name != "auto":
        return name
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        known = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        native = known.get("amx_bf16", False) or known.get("avx512_bf16", False)
    return "bf16" if native else "fp32"


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor`` of the host on ``device``; the host does not wait for the copy."""
    # From pinned memory a GPU fetches it by itself; from other memory the host would wait for its turn.
    source = tensor.pin_memory() if device.type == "cuda" else tensor
    return source.to(device, non_blocking=True)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
