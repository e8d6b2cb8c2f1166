"""How a process that trains on a CPU should be set up, before torch is imported."""

from __future__ import annotations

import ctypes
import os
import sys

# glibc's mallopt parameters (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGE_BUFFER_BYTES = 2**30


def set_up_process() -> None:
    """Make waiting threads sleep and freed buffers stay.

    By default an OpenMP thread spins while it waits, and beside another busy process every parallel region then waits
    for the scheduler: a step took up to ten times as long. And by default glibc returns each large buffer to the system
    when it is freed, so that every step faults its pages in again, about a fifth of the time of a small model's step.
    What the user has set in the environment stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if sys.platform == "linux" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        try:
            mallopt = ctypes.CDLL(None).mallopt
        except (OSError, AttributeError):  # another C library
            return
        mallopt(M_MMAP_THRESHOLD, LARGE_BUFFER_BYTES)
        mallopt(M_TRIM_THRESHOLD, LARGE_BUFFER_BYTES)
