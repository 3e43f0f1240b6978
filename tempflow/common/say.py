"""Words to the user, once per run however many processes there are."""

from __future__ import annotations

import os
import sys


def is_first() -> bool:
    """Whether this is the first of the processes that torchrun started, or the only one."""
    rank = os.environ.get("RANK", "0")
    return not rank.isdigit() or int(rank[:9]) == 0  # what is no number is said, and not by nobody


def say(words: str, everywhere: bool = False) -> None:
    """Prints a line on standard error, in the first process only, or in whichever calls it."""
    if everywhere or is_first():
        print(f"tempflow: {words}", file=sys.stderr, flush=True)
