"""Writes GenEval-style prompts, with the metadata its scorers read: `tempflow prompts FOLDER`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tempflow.commands.ending import Parser, end
from tempflow.common.errors import BadInput
from tempflow.common.files import check_makeable
from tempflow.prompts import read_prompts
from tempflow.rewards.geneval.mixes import EVEN, MIXES
from tempflow.rewards.geneval.words import WORDINGS

MOST = 1_000_000
"""Prompts of a file; there are some 600,000 different ones."""


def _excluded(file: str) -> set[str]:
    """What a file of prompts keeps out.

    Raises:
        BadInput: its metadata are of another kind.
    """
    from tempflow.rewards.geneval.prompts import identities

    prompts = read_prompts(file, "--exclude")
    try:
        return identities(prompts)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise BadInput("--exclude", file, "its metadata are not those of GenEval") from error


def make(given: argparse.Namespace) -> None:
    """Writes the files that the command line asks for.

    Raises:
        BadInput: wrong numbers, nothing to write, no prompt left, or a file that is there already.
    """
    from tempflow.rewards.geneval.prompts import check_free, content, generate, write

    for name in ("count", "test"):
        if not 0 <= getattr(given, name) <= MOST:
            raise BadInput(f"--{name}", getattr(given, name), f"must lie in 0 .. {MOST:,}")
    if not 0 <= given.seed < 2**62:
        raise BadInput("--seed", given.seed, "must lie in 0 .. 2**62 - 1")
    if not given.count and not given.test:
        raise BadInput("--count", 0, "with --test=0 there is nothing to write")
    phrase, outside = WORDINGS[given.wording], [_excluded(file) for file in given.exclude]
    check_makeable("folder", given.folder)
    for split in ("test", "train"):
        check_free(given.folder, split)
    taken: set[str] = set().union(*outside)
    test = generate(given.test, EVEN, given.seed + 1, given.max_count, taken, phrase)
    taken |= {name for task in test for name in (task["prompt"], content(task))}
    train = generate(given.count, MIXES[given.mix], given.seed, given.max_count, taken, phrase)
    for split, tasks in (("test", test), ("train", train)):
        write(given.folder, split, tasks)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return end(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    example = "tempflow prompts prompts/geneval --count 2000 --test 60"
    parser = Parser(prog="tempflow prompts", description=__doc__.partition("\n")[0], example=example)
    parser.add_argument("folder", type=Path, help="where train_metadata.jsonl and test_metadata.jsonl are written")
    parser.add_argument("--count", type=int, default=50000, help="training prompts (default: %(default)s; 0: none)")
    parser.add_argument("--test", type=int, default=480,
                        help="held-out prompts, as many of each task (default: 480; 0: none)")  # fmt: skip
    parser.add_argument("--mix", choices=MIXES, default="flow_grpo", help="proportions of the training prompts")
    parser.add_argument("--max-count", type=int, choices=range(2, 11), default=4, help="largest number of objects")
    parser.add_argument("--wording", choices=WORDINGS, default="geneval", help="two persons, or in English two people")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--exclude", action="append", default=[], help="file of prompts to keep out (repeatable)")
    given = parser.parse_args(arguments)
    make(given)
    print(f"{given.count} training and {given.test} held-out prompts in {given.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
