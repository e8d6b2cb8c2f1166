"""One early check of an id on the Hugging Face Hub, before libraries retry file by file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from .errors import UserError

TIMEOUT_SECONDS = 10


def require_on_hub(name: str, kind: Literal["model", "dataset"], called: str | None = None) -> None:
    """Refuse an id that is neither in the local cache nor on the Hub.

    Without a network the libraries would try each file for half a minute.

    Args:
        name: The id, ``OWNER/NAME``.
        kind: What it should be.
        called: How the message begins; the kind and the name if None.

    Raises:
        UserError: The Hub has nothing of this id, or cannot be reached.
    """
    from huggingface_hub import HfApi, constants, is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
    from huggingface_hub.file_download import repo_folder_name

    called = called or f"{kind} {name}"
    try:
        if (Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind) / "snapshots").is_dir():
            return
        if is_offline_mode():
            if kind == "dataset":  # it may be in the cache of another library, which does not retry
                return
            raise UserError(f"{called}: HF_HUB_OFFLINE is set, and it is not in the local cache; give a folder")
        HfApi().repo_info(name, repo_type=kind, timeout=TIMEOUT_SECONDS)
    except UserError:
        raise
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{called}: no such folder, and the Hugging Face Hub has no {kind} of this id that may be read; give "
            "a folder or another id"
        ) from error
    except HFValidationError as error:
        raise UserError(f"{called}: no such folder, and no id of the Hugging Face Hub; give either") from error
    except HfHubHTTPError:
        return  # the Hub answered; the libraries know what to do with it
    except Exception as error:  # the HTTP client's own kinds
        raise UserError(
            f"{called}: no such folder, and the Hugging Face Hub cannot be reached ({error}); give a folder, or "
            "an id where there is a network"
        ) from error
