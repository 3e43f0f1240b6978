"""Where files are: folders of the user, and folders that ship with the package."""

from __future__ import annotations

import hashlib
import os
import stat
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


def user_path(field: str, path: str | Path) -> Path:
    """The path that a user gave, with `~` filled in; there may be nothing at it yet.

    Args:
        field: where the path was given, for the message.
    Raises:
        BadInput: no file can have this name, or nobody can tell whether one has.
    """
    try:
        found = resolve(str(path), field)
        found.stat()
    except (FileNotFoundError, NotADirectoryError):
        return found
    except OSError as error:
        raise BadInput(field, path, f"cannot be looked at ({error.strerror})") from error
    except RuntimeError as error:  # of expanduser
        raise BadInput(field, path, "there is no such user; give the whole path") from error
    except ValueError as error:  # NUL bytes and half characters
        raise BadInput(field, path, "no file can have this name") from error
    return found


def check_makeable(field: str, folder: str | Path) -> None:
    """Refuses a folder that cannot be made, or in which no file can.

    Raises:
        BadInput: naming the field that gave it.
    """
    found = user_path(field, folder).absolute()
    existing = next(part for part in (found, *found.parents) if part.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise BadInput(field, folder, f"cannot be written: {existing} is no folder, or is not yours to write to")


def read_text(field: str, path: str | Path, most: int = 2**20) -> str:
    """A file of UTF-8 text, without the mark that some editors put before it.

    Args:
        field: where the path was given, for the message.
        most: bytes of the largest file that is read.
    Raises:
        BadInput: no such file, none that can be read to its end, too large, or other bytes than UTF-8 has.
    """
    file = user_path(field, path)
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):
            raise BadInput(field, path, "is no file; a folder, pipe or device is not read")
        if found.st_size > most:
            raise BadInput(field, path, f"has {found.st_size:,} bytes; at most {most:,} are read")
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise BadInput(field, path, "no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise BadInput(field, path, f"not readable as UTF-8 text ({reason})") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)  # on a full disk the part would only take room
        raise


def on_disk(path: Path) -> None:
    """Returns when the content of a file, or the names in a folder, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
