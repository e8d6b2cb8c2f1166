"""Sending a finished player to the Hugging Face Hub."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import HFValidationError, validate_repo_id

from avatarl.errors import RunFailed, UserError
from avatarl.sanitise import one_line


def push_to_hub(model: str | Path, repo: str, private: bool = False) -> str:
    """Send a finished player to the Hugging Face Hub, and return the address of its page.

    Everything that can be checked here is checked before anything is sent. The repository is made where it does not
    exist. Files of the same names are replaced, others stay.

    Args:
        model: A run folder (its best player) or a model folder.
        repo: OWNER/NAME on the Hub.
        private: Make the repository private if it is new; a public one is refused.

    Raises:
        UserError: The folder cannot be opened, the name is malformed, nobody is logged in, or the Hub refuses.
        RunFailed: The Hub cannot be reached, or the upload broke off.
    """
    from avatarl.models.loading import resolve_model

    from .players import open_player

    try:
        validate_repo_id(repo)
        is_name = repo.count("/") == 1
    except HFValidationError:
        is_name = False
    if not is_name:
        raise UserError(f"repo is {repo!r}; expected OWNER/NAME")
    folder = resolve_model(model)
    if not os.path.isdir(folder):
        raise UserError(f"{model}: no such folder; expected a run folder or a model folder")
    token = get_token()
    if token is None:
        raise UserError("nobody is logged in at the Hugging Face Hub; run `hf auth login`, or set HF_TOKEN")
    open_player(folder, "cpu")
    api = HfApi(token=token)
    try:
        page = api.create_repo(repo, private=private or None, exist_ok=True)
        is_public = private and not api.repo_info(repo).private
    except HfHubHTTPError as error:
        raise UserError(f"repo is {repo!r}, which the Hub refuses ({one_line(str(error))})") from error
    except Exception as error:  # of whichever HTTP library is below
        raise RunFailed(f"{api.endpoint} cannot be reached ({one_line(str(error))}); nothing was sent") from error
    if is_public:
        raise UserError(f"repo is {repo!r}, which is there and public; expected a private one, or a name not taken yet")
    try:
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a player of avatarl")
    except Exception as error:
        reason = one_line(" ".join(str(part) for part in (error, error.__cause__) if part))
        raise RunFailed(f"{folder} was not uploaded to {page} ({reason}); the same command begins again") from error
    return str(page)
