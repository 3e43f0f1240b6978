"""The hub: who is logged in, and a folder uploaded in one commit. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from tempflow.common.errors import BadInput

FIELD = "--push"


@dataclass(frozen=True)
class HubOptions:
    """What a hub folder needs besides the run."""

    base_model: str | None = None
    """the base's name on the hub"""
    repository: str | None = None
    """where the folder is uploaded to; None: nowhere"""
    private: bool = False
    """a repository that is made is private"""


def check_login(repository: str) -> None:
    """Whether the hub answers and knows who asks, before anything is made.

    Raises:
        BadInput: no such name can be, no login, no network.
    """
    owner, slash, _ = repository.partition("/")
    if not (owner and slash):
        raise BadInput(FIELD, repository, "give OWNER/NAME")
    with _one_line(repository, "nothing was made"):
        validate_repo_id(repository)
        HfApi().whoami()


def push(folder: Path, files: list[str], options: HubOptions) -> str:
    """Uploads files of a folder in one commit; returns the address of the repository.

    Raises:
        BadInput: the hub refused or was lost; the folder is whole all the same.
    """
    api, repository = HfApi(), str(options.repository)
    with _one_line(repository, f"{folder} is whole and stays; upload it again by --push with --force"):
        address = api.create_repo(repository, private=options.private or None, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=files,
                          commit_message="Weights and model card, by tempflow")  # fmt: skip
    return str(address)


@contextmanager
def _one_line(repository: str, left: str) -> Iterator[None]:
    """Whatever the hub's library raises, as one line that ends with what is left."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        hint = f"nobody is logged in: run `hf auth login` or set HF_TOKEN; {left}"
        raise BadInput(FIELD, repository, hint) from error
    except OfflineModeIsEnabled as error:
        raise BadInput(FIELD, repository, f"HF_HUB_OFFLINE is set, so there is no hub; unset it; {left}") from error
    except HFValidationError as error:
        raise BadInput(FIELD, repository, f"is no name of a repository; give OWNER/NAME; {left}") from error
    except (HTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadInput(FIELD, repository, f"the hub did not take it ({reason}); {left}") from error
