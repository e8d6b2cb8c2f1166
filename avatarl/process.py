"""How a process that trains on a CPU should be set up, before torch is imported."""

from __future__ import annotations

import ctypes
import os
import sys

# How often an OpenMP thread looks for work before it sleeps, some tens of microseconds (libgomp).
SPIN_COUNT = "10000"
# glibc's mallopt parameters (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGE_BUFFER_BYTES = 2**30


def set_up_process() -> None:
    """Let waiting threads fall asleep soon, and keep freed buffers.

    By default an OpenMP thread spins for milliseconds while it waits, and beside another busy process every parallel
    region then waits for the scheduler. Sleeping at once cures that but wakes too slowly for a small model's many short
    regions. And by default glibc returns each large buffer to the system when it is freed, so that every step faults
    its pages in again. docs/lab-log.md has the figures. What the user has set in the environment stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    if sys.platform == "linux" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        try:
            mallopt = ctypes.CDLL(None).mallopt
        except (OSError, AttributeError):  # another C library
            return
        mallopt(M_MMAP_THRESHOLD, LARGE_BUFFER_BYTES)
        mallopt(M_TRIM_THRESHOLD, LARGE_BUFFER_BYTES)
