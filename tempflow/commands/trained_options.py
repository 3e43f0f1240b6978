"""What `sample` and `evaluate` have in common: which models, which noises, where to."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tempflow.common.errors import BadInput
from tempflow.settings.reading import is_override, load

if TYPE_CHECKING:
    from tempflow.trained.source import Choice

MOST_NOISES, MOST_ROWS = 10_000, 100_000
LARGEST_SEED = 2**63 - 1


def add_options(parser: argparse.ArgumentParser, output: str) -> None:
    """The options of both commands."""
    parser.add_argument(
        "--checkpoint",
        metavar="WHICH",
        help="of a run: last, best (by gold), an iteration, final (the weights in its folder), or several: 10,20,best "
        "(default: last)",
    )
    parser.add_argument("--weights", choices=("averaged", "raw"), help="of checkpoints (default: averaged)")
    parser.add_argument("--no-before", action="store_true", help="leave the model before training out")
    parser.add_argument("--seed", type=int, help="of the noises (default: eval.seed)")
    parser.add_argument("--rows", type=int, help="pictures in one network call at most (default: tails.rows, up to 16)")
    parser.add_argument("--output", metavar="FOLDER", help=f"where to write (default: {output}, then {output}-2 ...)")
    parser.add_argument("--force", action="store_true", help="write into a folder that holds files already")


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of a run, presets and files, the first of which may be joined by commas; then settings."""
    count = next((place for place, word in enumerate(words) if is_override(word)), len(words))
    return [name for word in words[:count] for name in split_names(word)], list(words[count:])


def split_names(word: str) -> list[str]:
    """`digits,flow_grpo` -> its parts; a path may hold commas."""
    return [word] if "/" in word else word.split(",")


def check_stack(names: Sequence[str], overrides: Sequence[str]) -> None:
    """Answers wrong presets and settings before anything heavy is imported; those of a run are read later.

    Raises:
        BadInput: what `load` refuses.
    """
    if not any("/" in name or Path(name).is_dir() for name in names):
        load([*names, *overrides])


def read_choice(given: argparse.Namespace) -> Choice:
    """Which models are asked for; the numbers given are looked at, too.

    Raises:
        BadInput: a number out of its range, or no checkpoint between two commas.
    """
    from tempflow.trained.source import Choice, read_checkpoints

    ranges = {"noises": (1, MOST_NOISES), "seed": (0, LARGEST_SEED), "rows": (1, MOST_ROWS)}
    for name, (least, most) in ranges.items():
        value = getattr(given, name)
        if value is not None and not least <= value <= most:
            raise BadInput(f"--{name}", value, f"must lie in {least} .. {most}")
    return Choice(read_checkpoints(given.checkpoint), given.weights, not given.no_before)
