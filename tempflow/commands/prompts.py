"""Writes GenEval-style prompts, with the metadata its scorers read: `python -m tempflow.commands.prompts FOLDER`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tempflow.common.errors import BadInput
from tempflow.prompts import read_prompts
from tempflow.rewards.geneval.prompts import EVEN, MIXES, content, generate, identities, write
from tempflow.rewards.geneval.words import WORDINGS


def make(given: argparse.Namespace) -> None:
    """Writes the files that the command line asks for.

    Raises:
        BadInput: wrong numbers, nothing to write, no prompt left, or a file that is there already.
    """
    for name in ("count", "test"):
        if getattr(given, name) < 0:
            raise BadInput(f"--{name}", getattr(given, name), "must not be below 0")
    if not given.count and not given.test:
        raise BadInput("--count", 0, "with --test=0 there is nothing to write")
    phrase, outside = WORDINGS[given.wording], [identities(read_prompts(file, "--exclude")) for file in given.exclude]
    taken: set[str] = set().union(*outside)
    test = generate(given.test, EVEN, given.seed + 1, given.max_count, taken, phrase)
    taken |= {name for task in test for name in (task["prompt"], content(task))}
    train = generate(given.count, MIXES[given.mix], given.seed, given.max_count, taken, phrase)
    for split, tasks in (("test", test), ("train", train)):
        write(given.folder, split, tasks)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tempflow.commands.prompts", description=__doc__.partition("\n")[0])
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
    try:
        make(given)
    except BadInput as error:
        print(f"tempflow: {error}", file=sys.stderr)
        return 2
    print(f"{given.count} training and {given.test} held-out prompts in {given.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
