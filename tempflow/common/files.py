"""Where files are: folders of the user, and folders that ship with the package."""

from __future__ import annotations

import os
from pathlib import Path

from tempflow.common.errors import BadInput

PACKAGE = Path(__file__).resolve().parents[1]
SHIPPED = "tempflow:"


def resolve(path: str, field: str = "path") -> Path:
    """`tempflow:x` to the package's own folder x, anything else to the user's path.

    Args:
        field: the setting that the path was given in.
    Raises:
        BadInput: a `tempflow:` path that leaves the package.
    """
    if not path.startswith(SHIPPED):
        return Path(path).expanduser()
    found = PACKAGE / path.removeprefix(SHIPPED)
    if not Path(os.path.normpath(found)).is_relative_to(PACKAGE):
        raise BadInput(field, path, f"`{SHIPPED}` names what ships with the package, and this leaves it")
    return found


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
