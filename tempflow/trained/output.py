"""The folder that pictures or tables are written into: one of its own, unless another was asked for."""

from __future__ import annotations

from itertools import count
from pathlib import Path

from tempflow.common.errors import BadInput
from tempflow.common.files import check_makeable, user_path


def output_folder(given: str | None, default: Path, force: bool) -> Path:
    """Where to write: the folder given, or `default`, `default-2`, ... of which it is the first that is not there.

    Raises:
        BadInput: the folder given holds something and `force` is not set, or it cannot be written.
    """
    if given is None:
        names = (default if number == 1 else default.with_name(f"{default.name}-{number}") for number in count(1))
        folder = next(name for name in names if not name.exists())
    else:
        folder = user_path("--output", given)
        if not force and folder.is_dir() and any(folder.iterdir()):
            raise BadInput("--output", given, "holds files already; choose another, or --force writes over them")
    check_makeable("--output", folder)
    return folder


def make_folder(folder: Path) -> None:
    """Makes it where there is none.

    Raises:
        BadInput: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput("--output", folder, f"cannot be made ({error.strerror}); choose another") from error
