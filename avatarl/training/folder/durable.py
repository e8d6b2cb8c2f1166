"""Files and folders that are whole or absent, whenever the process or the machine stops.

What is new is written beside the old under a hidden name, brought to the disk, and takes its place by renaming.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, content: str) -> None:
    """Give ``path`` a new content (UTF-8); a reader finds the old one or the new one."""
    partial = _beside(path, "partial")
    partial.write_text(content, encoding="utf-8")
    flush(partial)
    partial.replace(path)
    flush(path.parent)


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let ``fill`` write a new folder, then put it in the place of ``folder``.

    Between the two renames there is none under that name; :func:`tidy` puts the old one back then. The parent must be
    there: one that is made anew may be the mount point of a file system that is gone.
    """
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
    """Remove a folder so that no part of it is ever seen under its name."""
    old = _beside(folder, "old")
    remove(old)
    folder.rename(old)
    remove(old)


def tidy(parent: Path) -> None:
    """Finish what an earlier process was stopped in, among the files and folders of ``parent``."""
    for old in parent.glob(".*.old"):
        final = parent / old.name.removeprefix(".").removesuffix(".old")
        if _beside(final, "partial").exists() and not final.exists():
            old.rename(final)  # stopped while replacing it
        else:
            remove(old)
    for partial in parent.glob(".*.partial"):
        remove(partial)


def remove(path: Path) -> None:
    """Remove a file or folder that may not be there."""
    if path.is_dir() and not path.is_symlink():
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
