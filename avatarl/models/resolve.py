"""Which folder or Hub id a model's name means; plain Python, so that torch can wait."""

from __future__ import annotations

import os
from pathlib import Path

from avatarl.errors import UserError
from avatarl.untrusted import check_library_folder

# Folders of ours that are taken for models, by a file that each has.
OTHER_FOLDERS = {
    "cache.json": "a cache of a critic",
    "cache.partial.json": "an unfinished cache of a critic",
    "manifest.json": "prepared data",
}


def resolve_model(model: str | Path) -> str:
    """The folder or hub id that ``model`` means: a run folder stands for its best player.

    Raises:
        UserError: A folder that is neither a run nor a model, or a model folder without safetensors.
    """
    folder = Path(model)
    if not os.path.exists(folder):  # unlike `Path.exists`, it takes any name
        # A hub id is NAME or OWNER/NAME; where OWNER is a folder here, a mistyped path is the likelier meaning.
        if len(folder.parts) > 2 or len(folder.parts) == 2 and Path(folder.parts[0]).exists():
            raise UserError(f"{model}: no such folder; expected a run folder, a model folder or a hub id")
        return str(model)
    if not (folder / "config.json").exists() and (folder / "player" / "config.json").exists():
        folder = folder / "player"
    if not (folder / "config.json").is_file():
        found = next((what for name, what in OTHER_FOLDERS.items() if (folder / name).exists()), "neither")
        raise UserError(
            f"{model} is {found}; expected a run folder (with player/) or a model folder (with config.json)"
        )
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} has no .safetensors file; expected a model saved with save_pretrained")
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} holds an adapter (adapter_config.json); expected a model with it merged in")
    check_library_folder(folder)
    return str(folder)
