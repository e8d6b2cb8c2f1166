"""Files and folders that are whole or absent, whenever the process or the machine stops.

What is new is written beside the old under a hidden name, brought to the disk, and takes its place by renaming.

A folder may come from somebody else. No link in it is followed to write or to delete, or replaced: each is refused in
a line. What is deleted has a name that only we give.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from avatarl.errors import UserError


def replace_file(path: Path, content: str) -> None:
    """Give ``path`` a new content (UTF-8); a reader finds the old one or the new one.

    Raises:
        UserError: It is a link, or what would be written beside it is.
    """
    refuse_link(path)
    partial = _beside(path, "partial")
    remove(partial)
    try:
        with open(open_own(partial, os.O_WRONLY | os.O_EXCL), "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()  # a full disk should not stay full of it
        raise
    flush(path.parent)


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let ``fill`` write a new folder, then put it in the place of ``folder``.

    Between the two renames there is none under that name; :func:`tidy` puts the old one back then. The parent must be
    there: one that is made anew may be the mount point of a file system that is gone.

    Raises:
        UserError: ``folder`` is a link, or what would be written beside it is.
    """
    refuse_link(folder)
    partial, old = _beside(folder, "partial"), _beside(folder, "old")
    remove(partial)
    try:
        partial.mkdir()
        fill(partial)
        readable = partial.stat().st_mode & 0o666  # some libraries make files that nobody else may read
        for path in (*partial.rglob("*"), partial):
            if path.is_file():
                path.chmod(readable)
            flush(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk should not stay full of it
        raise
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    flush(folder.parent)
    remove(old)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that no part of it is ever seen under its name.

    Raises:
        UserError: It is a link.
    """
    refuse_link(folder)
    old = _beside(folder, "old")
    remove(old)
    folder.rename(old)
    remove(old)


def tidy(parent: Path, is_ours: Callable[[str], object] = bool) -> None:
    """Finish what an earlier process was stopped in, among the files and folders of ``parent``.

    Args:
        parent: The folder.
        is_ours: Which names only we give in it; by default all.

    Raises:
        UserError: One of them is a link.
    """
    for old in parent.glob(".*.old"):
        final = parent / own_name(old.name)
        if not is_ours(final.name):
            continue
        if _beside(final, "partial").exists() and not final.exists():
            refuse_link(old)
            old.rename(final)  # stopped while replacing it
        else:
            remove(old)
    for partial in parent.glob(".*.partial"):
        if is_ours(own_name(partial.name)):
            remove(partial)


def own_name(name: str) -> str:
    """The name that a hidden ``.NAME.partial`` or ``.NAME.old`` stands beside; any other name as it is."""
    for state in (".partial", ".old"):
        if name.startswith(".") and name.endswith(state):
            return name.removeprefix(".").removesuffix(state)
    return name


def refuse_link(path: Path) -> None:
    """Refuse a link under a name of ours: what it leads to is somebody else's, and so is the link.

    Raises:
        UserError: naming it.
    """
    if path.is_symlink():
        raise UserError(f"{path} is a link; what is written there must lie there, so move the link away")


def open_own(path: Path, flags: int) -> int:
    """A descriptor of a file of ours, made where there is none; neither follows a link nor waits for a pipe.

    Raises:
        UserError: It is a link.
        OSError: It cannot be opened.
    """
    refuse_link(path)
    return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)


def remove(path: Path) -> None:
    """Remove a file or folder that may not be there.

    Raises:
        UserError: It is a link.
    """
    refuse_link(path)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until the system has brought a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path: Path, state: str) -> Path:
    return path.with_name(f".{path.name}.{state}")
