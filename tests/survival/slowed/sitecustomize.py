"""Slows one file system call down, so that a process can be killed in the middle of its writing.

This folder on PYTHONPATH makes Python import the module at its start; ``SLOW_CALL`` in the environment says what to do
as JSON: ``folder`` whose files count, ``only`` those with this in their path below it, ``number`` of the call that is
slowed (from 1; 0: none), ``after`` (whether it sleeps after the call rather than before it), ``seconds`` of sleep,
``trace`` (a file that gets a line for each call) and ``marker`` (a file that appears when the process sleeps). Nothing
in the package knows of it. What libraries in C++ and Rust write by themselves is not seen; kills at random times meet
those.
"""

import builtins
import functools
import io
import itertools
import json
import os
import shutil  # noqa: F401 - it looks at once at what os.unlink and its kin can do, so it must see the true ones
import time

ENVIRONMENT_NAME = "SLOW_CALL"
BY_PATH = ("rename", "replace", "link", "symlink", "unlink", "remove", "rmdir", "mkdir", "truncate")
BY_DESCRIPTOR = ("fsync", "fdatasync", "ftruncate", "write", "pwrite")

true_open, true_write, true_close, true_readlink = os.open, os.write, os.close, os.readlink


def slow_down(folder: str, only: str, number: int, after: bool, seconds: float, trace: str, marker: str) -> None:
    """Replace the calls of ``os`` and ``open`` that change files by ones that count, and sleep once."""
    folder = os.path.abspath(folder)
    counter = itertools.count(1)
    log = true_open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    process = os.getpid()

    def touches(place) -> str | None:
        path = os.path.abspath(os.fsdecode(place))
        is_inside = path == folder or path.startswith(folder + os.sep)
        return path if is_inside and only in path[len(folder) :] else None

    def run_slowly(call, path, arguments, options):
        if path is None or os.getpid() != process:  # a child that was forked, such as git's, is not ours to stop
            return call(*arguments, **options)
        is_chosen = next(counter) == number
        true_write(log, f"{call.__name__} {path}\n".encode())
        if is_chosen and not after:
            sleep(call, path)
        try:
            return call(*arguments, **options)
        finally:  # also after one that fails, such as removing what is not there
            if is_chosen and after:
                sleep(call, path)

    def sleep(call, path) -> None:
        partial = f"{marker}.{process}"
        descriptor = true_open(partial, os.O_WRONLY | os.O_CREAT, 0o644)
        true_write(descriptor, f"{call.__name__} {path}".encode())
        true_close(descriptor)
        true_rename(partial, marker)
        time.sleep(seconds)

    def by_path(call):
        @functools.wraps(call)
        def counted(*arguments, **options):
            place = arguments[0] if arguments else next(iter(options.values()))
            beside = options.get("dir_fd", options.get("src_dir_fd"))
            if isinstance(place, int):
                path = by_number(place)
            elif beside is not None:
                path = touches(os.path.join(by_number(beside) or "/", os.fsdecode(place)))
            else:
                path = touches(place)
            return run_slowly(call, path, arguments, options)

        return counted

    def by_number(descriptor) -> str | None:
        try:
            return touches(true_readlink(f"/proc/self/fd/{descriptor}"))
        except OSError:  # not Linux: these calls are not counted
            return None

    def by_descriptor(call):
        @functools.wraps(call)
        def counted(*arguments, **options):
            place = arguments[0]
            descriptor = place if isinstance(place, int) else place.fileno()
            return run_slowly(call, by_number(descriptor), arguments, options)

        return counted

    def open_file(call):
        @functools.wraps(call)
        def counted(file, mode="r", *arguments, **options):
            writes = any(letter in mode for letter in "wax+") and not isinstance(file, int)
            return run_slowly(call, touches(file) if writes else None, (file, mode, *arguments), options)

        return counted

    def open_descriptor(call):
        @functools.wraps(call)
        def counted(path, flags, *arguments, **options):
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and options.get("dir_fd") is None
            return run_slowly(call, touches(path) if writes else None, (path, flags, *arguments), options)

        return counted

    true_rename = os.rename
    for name in BY_PATH:
        setattr(os, name, by_path(getattr(os, name)))
    for name in BY_DESCRIPTOR:
        if hasattr(os, name):
            setattr(os, name, by_descriptor(getattr(os, name)))
    os.open = open_descriptor(os.open)
    builtins.open = io.open = open_file(io.open)


if ENVIRONMENT_NAME in os.environ:
    slow_down(**json.loads(os.environ[ENVIRONMENT_NAME]))
