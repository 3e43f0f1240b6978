"""Where an export goes: written whole beside its place, then moved there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
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


def check_apart(output: Path, kept: Mapping[str, Path]) -> None:
    """Refuses a place in or around a folder that an export reads: it would replace what it was made of.

    Args:
        kept: what a folder is of -> the folder.
    Raises:
        BadInput: naming the folder.
    """
    place = output.resolve()
    for name, folder in kept.items():
        held = folder.resolve()
        if held.exists() and (place.is_relative_to(held) or held.is_relative_to(place)):
            raise BadInput(FIELD, output, f"is in or around {folder}, the {name}'s own folder; give another place")


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
    """Puts what was made into its place; all of it, or where that fails or is interrupted, none."""
    if made.is_file() or not output.exists():
        os.replace(made, output)
        return
    before = workshop / "before"
    before.mkdir()
    with ExitStack() as back:
        for entry in sorted(made.iterdir()):
            place, aside = output / entry.name, before / entry.name
            back.callback(_put_back, entry, place, aside)
            if os.path.lexists(place):
                place.rename(aside)
            entry.rename(place)
        back.pop_all()  # all are in their places


def _put_back(entry: Path, place: Path, aside: Path) -> None:
    """Undoes the exchange of a file or folder, however far it came; links may lead nowhere while they lie aside."""
    if not os.path.lexists(entry):
        place.rename(entry)
    if os.path.lexists(aside):
        aside.rename(place)
