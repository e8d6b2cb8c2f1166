"""Read prepared data and caches of critics in full."""

from __future__ import annotations

from pathlib import Path


def verify(folders: list[str]) -> None:
    """Read prepared data and caches in full, even if they seem untouched since they were last read.

    Prints a line for each folder that is as it was written.

    Args:
        folders: Prepared data folders and caches of critics.

    Raises:
        UserError: A folder is neither, or a file is missing or not as it was written.
    """
    from avatarl.data import PreparedData

    from .critic_cache.read import is_cache, open_files, read_manifest, verify_files

    for folder in map(Path, folders):
        if is_cache(folder):
            _, manifest = read_manifest(folder)
            verify_files(folder, manifest, open_files(folder, manifest), anew=True)
        else:
            PreparedData.open(folder, anew=True)
        print(f"{folder} is as it was written")
