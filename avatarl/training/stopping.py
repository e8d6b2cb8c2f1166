"""Being asked to stop: SIGTERM and SIGINT."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time

from avatarl.errors import RunStopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A launcher passes on what a service manager has already sent to every process: the same request, twice.
ECHO_SECONDS = 5.0


class StopRequest:
    """Notes the first SIGTERM or SIGINT for the loop to see; a second one ends the process at once.

    Before there is a loop, the first one raises :class:`RunStopped` where it finds the process.

    Use as a context manager, around the run; outside of the main thread, where Python allows no handlers, it notes
    nothing. A process that has a launcher takes the same signal within five seconds for an echo of the first.
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
            # From here on the kernel's own action: it needs no Python, which may be waiting for a device.
            for each in SIGNALS:
                signal.signal(each, signal.SIG_DFL)
        show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
        name = signal.Signals(signum).name
        os.write(2, f"{show_cursor}avatarl: {name}: stopping after this step; a second one stops at once\n".encode())
