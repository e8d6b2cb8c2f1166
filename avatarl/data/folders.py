"""The files in a folder, each listed once however many links lead to it."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from avatarl.errors import UserError

NAMED_TWICE = "already read (named twice)"


def files_in(folder: Path) -> tuple[list[Path], Counter[str]]:
    """List the files in a folder and below it, sorted; count what is left out, by reason.

    Hidden files and folders are left out. Links are followed, but not to a folder that the link lies in. What has
    several names is listed once. The list may hold pipes and links to nothing.

    Raises:
        UserError: A folder cannot be read.
    """
    found: list[Path] = []
    left_out: Counter[str] = Counter()
    seen = set()
    waiting = [folder]
    for top in waiting:  # linked folders come last, so that one inside `folder` is listed under its own name
        for place, subfolders, names in os.walk(top, onerror=_refuse):
            if identity(place) in seen:
                left_out[NAMED_TWICE] += 1
                subfolders.clear()
                continue
            seen.add(identity(place))
            hidden = [name for name in (*subfolders, *names) if name.startswith(".")]
            left_out["hidden"] += len(hidden)
            subfolders[:] = sorted({*subfolders} - {*hidden})
            for link in (Path(place, name) for name in subfolders if os.path.islink(Path(place, name))):
                if Path(os.path.realpath(place)).is_relative_to(os.path.realpath(link)):
                    left_out["links in a circle"] += 1
                else:
                    waiting.append(link)
            found += [Path(place, name) for name in {*names} - {*hidden}]
    files: dict[tuple[int, int], Path] = {}
    for path in sorted(found):
        files.setdefault(identity(path), path)
    left_out[NAMED_TWICE] += len(found) - len(files)
    return list(files.values()), +left_out


def identity(path: str | Path) -> tuple[int, int]:
    """What all names of one file or folder have in common."""
    status = os.stat(path) if os.path.exists(path) else os.lstat(path)
    return status.st_dev, status.st_ino


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read ({error.strerror}); a readable folder is expected") from error
