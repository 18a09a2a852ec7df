"""Pushes an exported folder to a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled

from sfed.utils.errors import UserError
from sfed.utils.redaction import mask
from sfed.utils.text import one_line

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_name(name: str) -> None:
    """Refuse what is no name of a repository, before anything is written."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"--push-to-hub {name!r}: name the repository as ORG/NAME, such as hospitals/st-mary"
        )


def push(folder: Path, name: str) -> str:
    """Push a folder in one commit; a repository that is not there is made, and is private.

    The token is that of ``hf auth login`` or HF_TOKEN, the server that of HF_ENDPOINT.

    Args:
        folder: of an adapter or a model.
        name: ORG/NAME.

    Returns:
        Address of the commit, and whether the repository is private, in words.

    Raises:
        UserError: where the hub refuses or cannot be reached; without the token.
    """
    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        done = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message="Add an adapter trained with sfed"
        )
        is_private = api.repo_info(name).private
    except OfflineModeIsEnabled:
        raise UserError(f"--push-to-hub {name}: HF_HUB_OFFLINE is set; unset it") from None
    except Exception as error:  # noqa: BLE001  (of the hub, and of what it sends requests with)
        raise UserError(
            f"--push-to-hub {name}: the hub did not take it ({mask(one_line(error))}); {folder} is "
            "whole. Log in with `hf auth login`, or set HF_TOKEN to a token that may write there"
        ) from None
    return f"{done.commit_url} ({'private' if is_private else 'public'})"
