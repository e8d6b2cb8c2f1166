"""How a process should be set up, before torch is imported."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

# How often an OpenMP thread looks for work before it sleeps, some tens of microseconds (libgomp).
SPIN_COUNT = "10000"
# glibc's mallopt parameters (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGE_BUFFER_BYTES = 2**30
PR_SET_PDEATHSIG = 1  # prctl.h
PARENT = "AVATARL_PARENT"  # in the environment: the process that a command must not outlive


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


def end_with_parent() -> None:
    """Have this process stopped, as by SIGTERM, when the one that the environment names as its parent is gone.

    Linux alone tells a process; elsewhere it goes on to its end.
    """
    parent = os.environ.pop(PARENT, None)
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it was gone before
        os.kill(os.getpid(), signal.SIGTERM)
