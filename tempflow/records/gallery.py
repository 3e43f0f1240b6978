"""Small pictures of evaluations, `gallery/step_N/0.webp, 1.webp, ...`: what report.html and trackers show.

`pictures/step_N.png` holds the same pictures as they are, in one strip. Runs without a gallery are read from there.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from tempflow.common.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

SIDE = 256
"""pixels of the longer side of a small picture"""
LOSSLESS = 64
"""pixels of the longer side to which a picture is kept exactly"""
QUALITY = 80
"""of larger ones, 0 to 100"""
LARGEST = 2**22
"""bytes of a small picture that is read"""
FORMAT, SUFFIX = "WEBP", ".webp"


@dataclass(frozen=True)
class Room:
    """What the small pictures of a run may take."""

    evaluations: int
    size: float
    """bytes"""


@dataclass(frozen=True)
class Small:
    """One small picture."""

    data: bytes
    """of a WebP file"""
    width: int
    height: int


def keep_small(folder: Path, step: int, pictures: Tensor, room: Room) -> None:
    """Writes small copies of (n, 3, H, W) uint8 pictures of an evaluation, and drops others where there is no room."""
    if not (len(pictures) and room.evaluations):
        return
    target = folder / "gallery" / f"step_{step:06d}"
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for number, levels in enumerate(pictures.permute(0, 2, 3, 1).numpy()):
        (partial / f"{number}{SUFFIX}").write_bytes(_encoded(Image.fromarray(levels)))
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    _make_room(folder, step, room)


def steps_in(folder: Path) -> dict[int, Path]:
    """Evaluation -> its folder of small pictures, oldest first."""
    names = [(path.name[len("step_") :], path) for path in (folder / "gallery").glob("step_*")]
    return dict(sorted((int(number), path) for number, path in names if number.isdecimal()))


def read_small(folder: Path, steps: Iterable[int], count: int) -> dict[int, list[Small]]:
    """The small pictures of those evaluations that have all `count` of them.

    Of a run without a gallery, those of the first and the last evaluation, made from its strips.

    Raises:
        BadInput: a file that is no picture.
    """
    wanted, found = set(steps), steps_in(folder)
    if found:
        read = {step: _read_all(path, count) for step, path in found.items() if step in wanted}
        return {step: pictures for step, pictures in read.items() if pictures}
    strips = {step: folder / "pictures" / f"step_{step:06d}.png" for step in sorted(wanted)}
    kept = [step for step, path in strips.items() if path.is_file()]
    return {step: _cut(strips[step], count) for step in dict.fromkeys([*kept[:1], *kept[-1:]])}


def as_grid(pictures: Sequence[Small]) -> Image.Image:
    """The pictures side by side and below one another, about as many rows as columns."""
    columns = math.ceil(math.sqrt(len(pictures)))
    width, height = pictures[0].width, pictures[0].height
    grid = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height))
    for place, picture in enumerate(pictures):
        row, column = divmod(place, columns)
        grid.paste(Image.open(BytesIO(picture.data)), (column * width, row * height))
    return grid


def _encoded(image: Image.Image) -> bytes:
    """A copy of at most SIDE pixels."""
    small, buffer = image.convert("RGB"), BytesIO()
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    small.save(buffer, format=FORMAT, quality=QUALITY, lossless=max(small.size) <= LOSSLESS)
    return buffer.getvalue()


def _read_all(folder: Path, count: int) -> list[Small]:
    """The pictures of an evaluation; none where one is not there, or not any more."""
    try:
        return [_read(folder / f"{number}{SUFFIX}") for number in range(count)]
    except FileNotFoundError:
        return []


def _read(path: Path) -> Small:
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError("too large for a small picture")
        data = path.read_bytes()
        with Image.open(BytesIO(data), formats=[FORMAT]) as image:
            return Small(data, *image.size)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever Pillow says of foreign bytes
        raise BadInput("gallery", path, f"not readable as a picture ({error})") from error


def _cut(path: Path, count: int) -> list[Small]:
    """Small copies of the pictures of a strip."""
    try:
        with Image.open(path) as strip:
            width = strip.width // count
            pieces = [strip.crop((place * width, 0, (place + 1) * width, strip.height)) for place in range(count)]
        encoded = [_encoded(piece) for piece in pieces]
    except Exception as error:  # as above
        raise BadInput("pictures", path, f"not readable as a strip of {count} pictures ({error})") from error
    return [Small(data, *Image.open(BytesIO(data)).size) for data in encoded]


def _make_room(folder: Path, newest: int, room: Room) -> None:
    """Drops evaluations, each time the one whose neighbours are nearest, until the others have room.

    The first and the newest stay, so that before and after are always there.
    """
    kept = {step: (path, _size(path)) for step, path in steps_in(folder).items()}
    while len(kept) > 2 and (len(kept) > room.evaluations or sum(size for _, size in kept.values()) > room.size):
        steps = list(kept)
        inner = [place for place in range(1, len(steps) - 1) if steps[place] != newest]
        if not inner:
            return
        near = min(inner, key=lambda place: steps[place + 1] - steps[place - 1])
        shutil.rmtree(kept.pop(steps[near])[0])


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
