"""What torchrun says to each process in its environment: who it is, and among how many."""

from __future__ import annotations

import os
from dataclasses import dataclass

from tempflow.common.errors import BadInput

HINT = "start processes by torchrun, which sets it; for one process, unset RANK and WORLD_SIZE"


@dataclass(frozen=True)
class Place:
    """One process among all. Alone: rank 0 of 1."""

    rank: int
    size: int
    local: int
    """its number on this machine, which is that of its GPU"""


def read_place() -> Place:
    """This process's place.

    Raises:
        BadInput: naming the variable that is missing, no number, or out of range.
    """
    size = _number("WORLD_SIZE", 1, lowest=1)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        started = "RANK" in os.environ or "WORLD_SIZE" in os.environ
        needed = size > 1 or (started and not name.startswith("MASTER"))
        if needed and not os.environ.get(name):
            raise BadInput(name, os.environ.get(name), f"is not set; {HINT}")
    rank, local = _number("RANK", 0), _number("LOCAL_RANK", 0)
    if rank >= size:
        raise BadInput("RANK", rank, f"must be below WORLD_SIZE={size}; {HINT}")
    if size > 1 and _number("MASTER_PORT", 0) >= 2**16:
        raise BadInput("MASTER_PORT", os.environ["MASTER_PORT"], f"is no port; {HINT}")
    return Place(rank, size, local)


def _number(name: str, default: int, lowest: int = 0) -> int:
    """The number in a variable."""
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= lowest):
        raise BadInput(name, text, f"must be a whole number from {lowest} on; {HINT}")
    return int(text)
