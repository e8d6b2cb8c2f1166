"""A process that has imported everything and forks itself into a training process on request.

Importing torch and transformers takes seconds; a fork takes milliseconds. It is sound as long as no thread has been
started, which is checked. Requests and answers are lines of JSON on standard input and output:

    {"start": arguments of ``avatarl``, "log": file for its standard error, "slow": {...} or null} → {"pid": 123}
    {"poll": 123} → {"status": null while it lives, then what subprocess.Popen.returncode would be}
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path


def serve() -> None:
    """Answer requests until standard input ends."""
    import_everything()
    tasks = Path("/proc/self/task")
    assert not tasks.exists() or len(list(tasks.iterdir())) == 1, "a process with threads cannot be forked safely"
    children: set[int] = set()
    answer({"ready": os.getpid()})
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            pid = start(request["start"], request["log"], request["slow"])
            children.add(pid)
            answer({"pid": pid})
        else:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            children.discard(pid)
            answer({"status": os.waitstatus_to_exitcode(status) if pid else None})
    for pid in children:  # who asked for them is gone
        os.kill(pid, signal.SIGKILL)
    os._exit(0)  # tidying up after so many imports takes a second


def import_everything() -> None:
    """All that a training process of the tests imports; what is forgotten here is only imported later, and slower."""
    import torch.utils.tensorboard  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    import transformers.models.llama.tokenization_llama  # noqa: F401

    import avatarl.cli
    import avatarl.training  # noqa: F401


def answer(message: dict) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def start(arguments: list[str], log: str, slow: dict | None) -> int:
    """Fork a process in a session of its own that runs one command; return when it leads its group."""
    led, leads = os.pipe()
    pid = os.fork()
    if pid:
        os.close(leads)
        os.read(led, 1)  # a group can be killed only once it is there
        os.close(led)
        return pid
    status = 1
    try:
        os.setsid()
        nothing, errors = os.open(os.devnull, os.O_RDWR), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for descriptor, target in ((nothing, 0), (nothing, 1), (errors, 2)):
            os.dup2(descriptor, target)
        os.close(nothing)
        os.close(errors)
        os.close(led)
        os.write(leads, b"1")
        os.close(leads)
        sys.argv = ["avatarl", *arguments]
        if slow is not None:
            from .slowed.sitecustomize import slow_down

            slow_down(**slow)
        from avatarl.cli import main

        status = main(arguments)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status or 0)


if __name__ == "__main__":
    serve()
