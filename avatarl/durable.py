"""Write files and folders so that they are whole or absent, whenever the process or the machine stops.

New content is written beside the old under a hidden name, flushed to the disk, and renamed into place. A folder may
come from somebody else: a link in it is refused, never followed or replaced, and only names that this package gives
are deleted.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from avatarl.errors import UserError


def replace_file(path: Path, content: str) -> None:
    """Replace a file's content (UTF-8); a reader finds the old content or the new.

    Raises:
        UserError: The file, or the hidden one beside it, is a link.
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
            partial.unlink()  # free the space on a full disk
        raise
    flush(path.parent)


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let ``fill`` write a new folder, then put it in the place of ``folder``.

    Between the two renames no folder has that name; after a stop there, :func:`tidy` puts the old one back. The parent
    must exist, since creating it could write below the mount point of a file system that is gone.

    Raises:
        UserError: ``folder``, or a hidden one beside it, is a link.
    """
    refuse_link(folder)
    partial, old = _beside(folder, "partial"), _beside(folder, "old")
    remove(partial)
    try:
        partial.mkdir()
        fill(partial)
        readable = partial.stat().st_mode & 0o666  # some libraries make files private to their owner
        for path in (*partial.rglob("*"), partial):
            if path.is_file():
                path.chmod(readable)
            flush(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # free the space on a full disk
        raise
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    flush(folder.parent)
    remove(old)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that no part of it is ever found under its name.

    Raises:
        UserError: It is a link.
    """
    refuse_link(folder)
    old = _beside(folder, "old")
    remove(old)
    folder.rename(old)
    remove(old)


def tidy(parent: Path, is_ours: Callable[[str], object] = bool) -> None:
    """Finish or undo the replacements in ``parent`` during which an earlier process was stopped.

    Args:
        parent: The folder.
        is_ours: Whether a name in it is one that only this package gives; by default all are.

    Raises:
        UserError: One of them is a link.
    """
    for old in parent.glob(".*.old"):
        final = parent / own_name(old.name)
        if not is_ours(final.name):
            continue
        if _beside(final, "partial").exists() and not final.exists():
            refuse_link(old)
            old.rename(final)  # stopped between the two renames
        else:
            remove(old)
    for partial in parent.glob(".*.partial"):
        if is_ours(own_name(partial.name)):
            remove(partial)


def own_name(name: str) -> str:
    """Return NAME of a hidden ``.NAME.partial`` or ``.NAME.old``, and any other name unchanged."""
    for state in (".partial", ".old"):
        if name.startswith(".") and name.endswith(state):
            return name.removeprefix(".").removesuffix(state)
    return name


def refuse_link(path: Path) -> None:
    """Refuse a link where this package writes: its target, and the link itself, belong to somebody else.

    Raises:
        UserError: naming the link.
    """
    if path.is_symlink():
        raise UserError(f"{path} is a link; what is written there must lie there, so move the link away")


def open_own(path: Path, flags: int) -> int:
    """Open or create a file of this package and return its descriptor; follow no link, wait for no pipe.

    Raises:
        UserError: It is a link.
        OSError: It cannot be opened.
    """
    refuse_link(path)
    return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)


def remove(path: Path) -> None:
    """Remove a file or folder if it exists.

    Raises:
        UserError: It is a link.
    """
    refuse_link(path)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until the system has written a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path: Path, state: str) -> Path:
    return path.with_name(f".{path.name}.{state}")
