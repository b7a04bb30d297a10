"""An export on the Hugging Face hub, when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stepwise.errors import ConfigError


def check(repo: str) -> None:
    """Raise `ConfigError` where nothing could be uploaded to `repo`: no name of a repository, no network, no token."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils._validators import validate_repo_id

    with _telling(repo, kept="nothing was exported yet"):
        validate_repo_id(repo)
        HfApi().whoami()


def push(folder: Path, repo: str) -> str:
    """Upload a folder; return its address. A repository that is new is private. Raises `ConfigError` where it fails."""
    from huggingface_hub import HfApi

    with _telling(repo, kept=f"the export is in {folder}"):
        api = HfApi()
        api.create_repo(repo, private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload an export of stepwise"))


@contextmanager
def _telling(repo: str, *, kept: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of the hub, of three layers below it, and of names
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(
            f"The hub cannot be used: {reason}; {kept}",
            where=f"--push {repo}",
            wanted="USER/NAME, a network, and a token that may write: `hf auth login`",
        ) from error
