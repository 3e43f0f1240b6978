"""Scores a folder of pictures into CSV, so that scorers can be tried before a long run:

    tempflow score --reward pickscore --reward ocr pictures/ prompts.txt

Pictures are taken in the order of their names, prompts in the order of their lines (text, or JSONL with metadata);
one prompt alone goes with every picture.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tempflow.commands.ending import Parser, end
from tempflow.common.errors import BadInput
from tempflow.common.files import check_makeable, user_path, write_atomically
from tempflow.prompts import Prompt, read_prompts
from tempflow.rewards.names import SCORERS

if TYPE_CHECKING:  # help is answered before any of it is imported
    from PIL.Image import Image
    from torch import Tensor

    from tempflow.rewards.scorer import Scorer

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def parser() -> Parser:
    """The command line."""
    example = "tempflow score --reward jpeg_compressibility runs/digits/pictures prompts.txt"
    own = Parser(prog="tempflow score", description=__doc__, example=example)
    own.add_argument("images", help=f"folder of pictures ({', '.join(SUFFIXES)})")
    own.add_argument("prompts", help="one prompt a line, or a .jsonl file")
    own.add_argument("--reward", action="append", required=True, help=f"{', '.join(SCORERS)}, or module:attribute")
    own.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the scorer, such as path=/models/pickscore; REWARD.KEY=VALUE for one of several scorers",
    )
    own.add_argument("--device", default="auto", help="auto takes a GPU if there is one (default: %(default)s)")
    own.add_argument("--rows", type=int, default=16, help="pictures in one call, default %(default)s")
    own.add_argument("--output", help="CSV file; default: standard output")
    own.add_argument("--force", action="store_true", help="overwrite the CSV file, if it is there already")
    return own


def find_images(folder: str) -> list[Path]:
    """Picture files of a folder, by name.

    Raises:
        BadInput: no such folder, none that can be read, no picture in it, or something that only has a picture's name.
    """
    path = user_path("images", folder)
    if not path.is_dir():
        raise BadInput("images", folder, "no such folder")
    try:
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    except OSError as error:
        raise BadInput("images", folder, f"cannot be read ({error.strerror})") from error
    for file in files:
        if not user_path("images", file).is_file():
            raise BadInput("images", file, "is no file; a folder, pipe or device is not read as a picture")
        if not file.name.isprintable():
            raise BadInput("images", file, "has a name that a table of text cannot hold; rename it")
    if not files:
        raise BadInput("images", folder, f"holds no picture; looked for {', '.join(SUFFIXES)}")
    return files


def match_prompts(prompts: list[Prompt], count: int, source: str) -> list[Prompt]:
    """A prompt for each of `count` pictures."""
    if len(prompts) == 1:
        return prompts * count
    if len(prompts) != count:
        raise BadInput("prompts", source, f"holds {len(prompts)} prompts for {count} pictures; give as many, or one")
    return prompts


@contextmanager
def opened(file: Path) -> Iterator[Image]:
    """The picture in a file.

    Raises:
        BadInput: it is none, or one that grows beyond what Pillow unpacks; what is said of it comes from many readers.
    """
    from PIL import Image

    try:
        with Image.open(file) as image:
            yield image
    except Exception as error:
        raise BadInput("images", file, f"not readable as a picture ({error})") from error


def read_image(file: Path) -> Tensor:
    """uint8 (3, H, W)."""
    import numpy as np
    import torch

    with opened(file) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def score(scorer: Scorer, files: Sequence[Path], prompts: Sequence[Prompt]) -> list[float]:
    """Scores of picture files, in calls of neighbours that have one size."""
    import torch
    from tqdm import tqdm

    scores: list[float] = []
    images: list[Tensor] = []
    with tqdm(total=len(files), desc=scorer.name, unit="picture", file=sys.stderr) as bar:
        for place, file in enumerate(files, 1):
            images.append(read_image(file))
            last = place == len(files) or len(images) == scorer.rows
            if not last and read_size(files[place]) == images[-1].shape[1:]:
                continue
            scores += scorer(torch.stack(images), prompts[len(scores) : place]).tolist()
            bar.update(len(images))
            images = []
    return scores


def read_size(file: Path) -> tuple[int, int]:
    """Height and width."""
    with opened(file) as image:
        return image.height, image.width


def run(arguments: Sequence[str]) -> None:
    """Scores and writes.

    Raises:
        BadInput: anything the user has to change.
    """
    given = parser().parse_args(arguments)
    from tempflow.rewards.parts.options import read_device, read_options
    from tempflow.rewards.scorer import load_scorer

    if given.rows < 1:
        raise BadInput("--rows", given.rows, "must be at least 1")
    check_output(given.output, given.force)
    rewards = list(dict.fromkeys(given.reward))
    options = read_options(given.option, rewards)
    files = find_images(given.images)
    prompts = match_prompts(read_prompts(given.prompts, "prompts"), len(files), given.prompts)
    device, columns = read_device(given.device), []
    for reward in rewards:
        scorer = load_scorer("--reward", reward, given.rows, options[reward], device)
        scorer.check(prompts)
        columns.append(score(scorer, files, prompts))
    rows = [[file.name, prompt.text, *values] for file, prompt, *values in zip(files, prompts, *columns, strict=True)]
    write(rows, ["file", "prompt", *(["score"] if len(rewards) == 1 else rewards)], given.output, given.force)


def check_output(output: str | None, force: bool) -> None:
    """The CSV file can be written, and nothing is lost by that. A link, a pipe or a device is never replaced by a file.

    Raises:
        BadInput: naming what stands in the way.
    """
    if output is None:
        return
    path = user_path("--output", output)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        hint = "is a link, pipe, device or folder and is left alone; name a file, or none for standard output"
        raise BadInput("--output", output, hint)
    if path.exists() and not force:
        raise BadInput("--output", output, "exists already; --force overwrites it")
    if not path.absolute().parent.is_dir():
        raise BadInput("--output", output, "cannot be written: there is no such folder")
    check_makeable("--output", path.absolute().parent)


def write(rows: Sequence[Sequence[Any]], header: Sequence[str], output: str | None, force: bool) -> None:
    """CSV to a file, which is there in full or not at all, or to standard output."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    if output is None:
        sys.stdout.write(text.getvalue())
        return
    check_output(output, force)
    try:
        write_atomically(user_path("--output", output), text.getvalue().encode())
    except OSError as error:
        raise BadInput("--output", output, f"cannot be written ({error.strerror})") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; wrong input ends with one line and exit code 2."""

    def work() -> int:
        run(sys.argv[1:] if arguments is None else arguments)
        return 0

    return end(work)


if __name__ == "__main__":
    sys.exit(main())
