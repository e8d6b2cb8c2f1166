"""The Hugging Face Hub, asked once before its libraries ask again and again."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from .errors import UserError

TIMEOUT_SECONDS = 10


def require_on_hub(name: str, kind: Literal["model", "dataset"], called: str | None = None) -> None:
    """Refuse an id that the Hub does not know, or all of them where it cannot be reached.

    Without network, the libraries try each file for half a minute. What an earlier download left in the local cache
    needs no network, and is left to them. Messages begin with ``called``, the kind and the name where None.

    Raises:
        UserError: The id names nothing on the Hub, or nobody answers.
    """
    from huggingface_hub import HfApi, constants, is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
    from huggingface_hub.file_download import repo_folder_name

    called = called or f"{kind} {name}"
    try:
        if (Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind) / "snapshots").is_dir():
            return
        if is_offline_mode():
            if kind == "dataset":  # which may lie in another cache, and is not waited for
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
        return  # an answer: what to make of it is for the libraries to decide
    except Exception as error:  # of whatever kind the library's HTTP client raises
        raise UserError(
            f"{called}: no such folder, and the Hugging Face Hub cannot be reached ({error}); give a folder, or "
            "an id where there is a network"
        ) from error
