"""Requests to stop: SIGTERM and SIGINT."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time

from avatarl.errors import RunStopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A launcher forwards a signal that a service manager may have sent to every process already: one request, twice.
ECHO_SECONDS = 5.0


class StopRequest:
    """Notes the first SIGTERM or SIGINT for the loop; a second one ends the process at once.

    Before the loop starts, the first one raises :class:`RunStopped`.

    Use as a context manager around the run. Outside the main thread, where Python allows no handlers, it does nothing.
    With a launcher, the same signal within five seconds counts as an echo of the first.
    """

    def __init__(self, has_launcher: bool = False):
        self.signum = 0  # none yet
        self.is_seen_by_loop = False
        self._has_launcher = has_launcher
        self._noted_at = -math.inf
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {signum: signal.signal(signum, self._note) for signum in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _frame) -> None:
        if self.signum:
            if signum != self.signum or time.monotonic() - self._noted_at > ECHO_SECONDS:
                os._exit(128 + signum)
            return
        self.signum, self._noted_at = signum, time.monotonic()
        if not self.is_seen_by_loop:
            raise RunStopped(signum, "stopped before the first step")
        if not self._has_launcher:
            # A second signal gets the kernel's own action, which needs no Python; that may be waiting for a device.
            for each in SIGNALS:
                signal.signal(each, signal.SIG_DFL)
        show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
        name = signal.Signals(signum).name
        os.write(2, f"{show_cursor}avatarl: {name}: stopping after this step; a second one stops at once\n".encode())
