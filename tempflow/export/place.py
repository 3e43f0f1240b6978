"""Where an export goes: written whole beside its place, then moved there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from tempflow.common.errors import BadInput
from tempflow.common.files import check_makeable, user_path

FIELD = "--output"


def check_place(output: Path, file: bool, force: bool) -> None:
    """Refuses a place where something is already, or where nothing can be written.

    Args:
        file: a file goes there, not a folder.
        force: files of an earlier export may be replaced.
    Raises:
        BadInput: naming what to do.
    """
    user_path(FIELD, output)
    check_makeable(FIELD, output.absolute().parent)
    if not output.exists():
        return
    if output.is_dir() == file:
        raise BadInput(FIELD, output, f"is a {'folder' if file else 'file'} already; give another place")
    if not (force or (output.is_dir() and not any(output.iterdir()))):
        raise BadInput(FIELD, output, "exists already; --force replaces its files, or give another place")


def check_room(output: Path, needed: int) -> None:
    """Refuses a disk with fewer than `needed` bytes free.

    Raises:
        BadInput: with both numbers.
    """
    existing = next(part for part in output.absolute().parents if part.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise BadInput(FIELD, output, f"needs {needed / 2**30:,.2f} GiB, and {free / 2**30:,.2f} are free there")


@contextmanager
def placed(output: Path) -> Iterator[Path]:
    """A path beside `output` at which a file or folder is to be made, which takes its place at the end.

    Of a folder that is there already, files and folders of the same names are replaced, and others stay.

    Raises:
        BadInput: it cannot be written; then nothing has changed.
    """
    output = output.absolute()
    fresh = [folder for folder in output.parents if not folder.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as workshop:
            made = Path(workshop) / output.name
            yield made
            _open_to_readers(made)
            _move(made, output, Path(workshop))
    except (OSError, SafetensorError) as error:  # the latter is how safetensors tells of a full disk
        at = getattr(error, "filename", None)
        if at is not None and not Path(os.fsdecode(at)).absolute().is_relative_to(output.parent):
            raise  # of what is read
        reason = getattr(error, "strerror", None) or str(error)
        raise BadInput(FIELD, output, f"cannot be written ({reason})") from error
    finally:
        for folder in fresh:
            with suppress(OSError):  # it holds the export
                folder.rmdir()


def _open_to_readers(made: Path) -> None:
    """Gives files the usual permissions: safetensors keeps its own from all but their owner."""
    mask = os.umask(0)
    os.umask(mask)
    for file in [made, *made.rglob("*")]:
        if file.is_file():
            file.chmod(0o666 & ~mask)


def _move(made: Path, output: Path, workshop: Path) -> None:
    if made.is_file() or not output.exists():
        os.replace(made, output)
        return
    before = workshop / "before"
    before.mkdir()
    for entry in sorted(made.iterdir()):
        _exchange(entry, output / entry.name, before / entry.name)


def _exchange(fresh: Path, place: Path, aside: Path) -> None:
    """Puts a file or folder into its place; what was there goes aside, and comes back where that fails."""
    if place.exists():
        place.rename(aside)
    try:
        fresh.rename(place)
    except OSError:
        if aside.exists():
            aside.rename(place)
        raise
