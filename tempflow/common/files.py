"""Where files are: folders of the user, and folders that ship with the package."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
SHIPPED = "tempflow:"


def resolve(path: str) -> Path:
    """`tempflow:x` to the package's own folder x, anything else to the user's path."""
    return PACKAGE / path.removeprefix(SHIPPED) if path.startswith(SHIPPED) else Path(path).expanduser()


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
