"""Words to the user, once per run however many processes there are."""

from __future__ import annotations

import os
import sys


def is_first() -> bool:
    """Whether this is the first of the processes that torchrun started, or the only one."""
    rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    later = rank.isdecimal() and size.isdecimal() and 0 < int(rank[:9]) < int(size[:9])
    return not later  # nor is one whose environment is wrong: somebody has to say so


def say(words: str, everywhere: bool = False) -> None:
    """Prints a line on standard error, in the first process only, or in whichever calls it."""
    if everywhere or is_first():
        print(f"tempflow: {words}", file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Prints a text on standard output, in the first process only, for whoever still reads it: `--help | head` is no
    failure."""
    try:
        if is_first():
            print(text, flush=True)
    except BrokenPipeError:
        leave_pipe()


def leave_pipe() -> None:
    """Sends standard output nowhere from now on, or the interpreter complains as it ends that its reader has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
