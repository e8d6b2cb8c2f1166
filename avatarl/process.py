"""Settings of the process itself, made before torch is imported."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

# How often a waiting OpenMP thread (libgomp) looks for work before it sleeps: some tens of microseconds.
SPIN_COUNT = "10000"
# glibc's mallopt parameters (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGE_BUFFER_BYTES = 2**30
PR_SET_PDEATHSIG = 1  # prctl.h
PARENT = "AVATARL_PARENT"  # environment variable: the id of a process that the command must not outlive


def set_up_process() -> None:
    """Let waiting threads sleep soon, and keep freed buffers in the process.

    By default an OpenMP thread spins for milliseconds while it waits. If another process is busy, every parallel region
    then waits for the scheduler. A thread that sleeps at once wakes too slowly for the many short regions of a small
    model. By default glibc also returns each large freed buffer to the system, so that every step faults its pages in
    again. docs/lab-log.md has the figures. Environment variables that the user has set take precedence.
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
    """Have the kernel send SIGTERM to this process when the parent that the environment names ends; Linux only."""
    parent = os.environ.pop(PARENT, None)
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it had ended before
        os.kill(os.getpid(), signal.SIGTERM)
