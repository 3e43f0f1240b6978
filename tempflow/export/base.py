"""The model that was trained, as a model card tells of it: its name on the hub, and its licence."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCard, constants, hf_hub_url
from huggingface_hub.errors import HTTPError
from yaml import YAMLError

from tempflow.common.errors import BadInput
from tempflow.common.files import SHIPPED, resolve
from tempflow.common.say import say
from tempflow.export.subject import Subject
from tempflow.models.index import read_index

FIELDS = ("license", "license_name", "license_link")
"""What the head of a model card tells of a licence."""


@dataclass(frozen=True)
class Base:
    """A base model."""

    hub: str | None
    """its name on the hub, if it is known to have one"""
    shown: str
    """that name, or the folder it has here"""
    licence: dict[str, str] = field(default_factory=dict)
    """FIELDS, as far as its files tell them"""
    files: tuple[Path, ...] = ()
    """texts of its licence"""

    @property
    def link(self) -> str:
        """The base in Markdown."""
        return f"[{self.hub}]({constants.ENDPOINT}/{self.hub})" if self.hub else f"`{self.shown}`"


def find_base(subject: Subject, name: str | None) -> Base:
    """The base of a run.

    Args:
        name: its name on the hub, where the run has it in a folder.
    """
    path = subject.model.path
    folder, _ = read_index(path)  # of the hub's, what is here already: weights are not fetched for a card
    hub = name or (None if resolve(path, "model.path").exists() else path)
    files = tuple(file for file in sorted(folder.glob("LICENSE*")) if file.is_file())
    return Base(hub, hub or path, _licence(folder, hub, files), files)


def check_public(subject: Subject, name: str | None) -> None:
    """Refuses to upload a card whose base is a folder of this machine.

    Raises:
        BadInput: saying what to give.
    """
    path = subject.model.path
    if name is None and not path.startswith(SHIPPED) and resolve(path, "model.path").exists():
        hint = f"the run has its base in the folder {path}, where nobody else finds it; give the base's name on the hub"
        raise BadInput("--base-model", "", hint)


def _licence(folder: Path, hub: str | None, files: tuple[Path, ...]) -> dict[str, str]:
    """What the base's own card tells, or that there is a text."""
    told = _card(folder / "README.md" if (folder / "README.md").is_file() else hub)
    found = {name: str(told[name]) for name in FIELDS if told.get(name)}
    link = found.get("license_link", "")
    if link and "://" not in link and link not in [file.name for file in files]:
        found |= {"license_link": hf_hub_url(hub, link)} if hub else {}
    if not found and files:
        return {"license": "other", "license_name": "licence-of-the-base", "license_link": files[0].name}
    return found


def _card(source: Path | str | None) -> dict:
    """The head of a model card; empty where there is none, or no hub."""
    if source is None:
        return {}
    if isinstance(source, str):
        say(f"looking for the licence of {source} on the hub")
    try:
        return ModelCard.load(source).data.to_dict()
    except (HTTPError, OSError, ValueError, YAMLError):
        return {}
