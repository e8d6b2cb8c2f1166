"""Which kernels read the logits, by name.

chunked
    Eager PyTorch, on any device.
compiled
    The same functions through ``torch.compile``: one pass each, after some seconds at the first call. Needs a C++
    compiler on a CPU, Triton on a GPU.
triton
    Hand-written Triton kernels, for CUDA (or any device under Triton's interpreter).
auto
    One that was timed on that kind of device; see :data:`AUTO`.
"""

from __future__ import annotations

import functools
import logging

import torch

from ..kernels import PLAIN, Kernels

IMPLEMENTATIONS = ("auto", "chunked", "compiled", "triton")
# benchmarks/README.md has the figures. ``compiled`` makes fewer passes on a CPU, but a first call that takes seconds
# and asks for a compiler is for the user to choose.
AUTO = {"cpu": "chunked"}
UNTIMED = "chunked"

_log = logging.getLogger("avatarl")


def choose(impl: str, device_type: str) -> str:
    """The implementation that ``impl`` means on this kind of device.

    Raises:
        ValueError: There is none of that name.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl is {impl!r}; expected one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    if impl != "auto":
        return impl
    if not torch.compiler.is_compiling():
        _say_choice(device_type)
    return AUTO.get(device_type, UNTIMED)


@functools.cache  # once for each kind of device
def _say_choice(device_type: str) -> None:
    known = "" if device_type in AUTO else "; nothing was timed there"
    _log.info("linear loss on %s: %s%s", device_type, AUTO.get(device_type, UNTIMED), known)


def check_implementation(impl: str, device_type: str) -> None:
    """Find out early whether ``impl`` can run on this kind of device.

    Raises:
        ValueError: There is none of that name, it needs a library that is not installed, or another device.
    """
    kernels(choose(impl, device_type)).check_device(device_type)


@functools.cache
def kernels(chosen: str) -> Kernels:
    """The kernels of an implementation; imported here because the import itself takes seconds.

    Raises:
        ValueError: They need a library that is not installed.
    """
    if chosen == "compiled":
        from .compiled import CompiledKernels

        return CompiledKernels()
    if chosen == "triton":
        try:
            from .triton_kernels import TritonKernels
        except ModuleNotFoundError as error:
            raise ValueError(f"impl='triton' needs {error.name}, which is not installed") from error
        return TritonKernels()
    return PLAIN
