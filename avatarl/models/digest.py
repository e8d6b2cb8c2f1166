"""What a model, its files and a tokenizer are, as SHA-256: to know them again wherever they were loaded from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from avatarl.errors import UserError
from avatarl.files import File, ask

from .resolve import resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from avatarl.data import PreparedData


def digest_of_model(model: PreTrainedModel) -> str:
    """SHA-256 over a model's configuration and weights, wherever it was loaded from."""
    import torch

    from .quantisation import plain_tensors

    config = {
        name: value
        for name, value in model.config.to_dict().items()
        if name not in ("_name_or_path", "transformers_version", "dtype")
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        for plain in plain_tensors(tensor.detach()):
            digest.update(plain.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def digest_of_tokenizer(data: PreparedData) -> str:
    """SHA-256 over what decides a prepared folder's tokens: its tokenizer.json, or every file where there is none.

    What else the library writes differs from one saving to the next.
    """
    files = {name: record for name, record in data.manifest["files"].items() if name.startswith("tokenizer/")}
    files = {name: record for name, record in files.items() if name == "tokenizer/tokenizer.json"} or files
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def weight_files(model: str, anew: bool = False) -> dict[str, dict] | None:
    """Size and SHA-256 of a model folder's configuration and weights, by name; None where it is not a folder here."""
    try:
        folder = Path(resolve_model(model))
    except UserError:
        return None
    if not folder.is_dir():
        return None
    files = [File(path) for path in (folder / "config.json", *sorted(folder.glob("*.safetensors")))]
    digests = ask(folder, [(file, "sha256", File.digest) for file in files], anew)
    return {
        file.path.name: {"bytes": file.stamp.size, "sha256": digest}
        for file, digest in zip(files, digests, strict=True)
    }
