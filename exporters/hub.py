"""A folder of proven files as a model repository of the hub: huggingface.co, or what HF_ENDPOINT names."""

import sys
from pathlib import Path

import huggingface_hub
from httpx2 import HTTPError
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OIDCError
from huggingface_hub.utils import validate_repo_id

OURS = ["model.onnx", "model.int8.onnx", "model.pt2", "model.pte"]  # an earlier push's are no longer proven


class HubError(Exception):
    """The hub cannot be used, or did not take something; the message is one line, without the token."""


def check_repository(name: str) -> None:
    """Raise ValueError for a name that no repository has: NAME or OWNER/NAME."""
    validate_repo_id(name)


def find_token() -> str:
    """The token of HF_TOKEN or of `hf auth login`. Raises HubError where there is none."""
    try:
        token = huggingface_hub.get_token()
    except (OIDCError, HTTPError, OSError) as error:
        raise HubError(f"no token ({_first_line(error)})") from None
    if token is None:
        raise HubError("no token; set HF_TOKEN, or run `hf auth login`")
    return token


def push(folder: Path, repository: str, private: bool, token: str) -> str:
    """Upload all files of a folder in one commit, which removes those of OURS that the folder lacks.

    Args:
        folder: what is uploaded, without subfolders.
        repository: is made where it is not there.
        private: make it so; an existing one must be.
        token: of an account that may write to it.

    Returns:
        Where it is to be seen.

    Raises:
        HubError: see there; the hub has then made no commit.
    """
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
        huggingface_hub.logging.set_verbosity_error()
    api = HfApi(token=token)
    try:
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.repo_info(url.repo_id).private:
            raise HubError("exists and is public; make it private there, or choose another name")
        message = "Model, proofs and card"
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message=message, delete_patterns=OURS)
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = error.server_message or error.response.reason_phrase
        hint = "; may this token write there?" if status in (401, 403) else ""
        raise HubError(f"{api.endpoint} answered {status} ({_first_line(said)}){hint}".replace(token, "***")) from None
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # the last: an upload that failed
        raise HubError(f"{api.endpoint} cannot be used ({_first_line(error)})".replace(token, "***")) from None
    return str(url)


def _first_line(thing: object) -> str:
    return next((line for line in str(thing).splitlines() if line.strip()), type(thing).__name__)
