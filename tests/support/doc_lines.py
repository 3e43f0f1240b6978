"""Command lines of the project in shell text: what is parsed, whether or not it is run."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

OPERATORS = {"&&", "||", "|", ";", ">", ">>", "2>", "2>&1", "&"}


@dataclass(frozen=True)
class Line:
    """`COMMAND ...` of the project, and how many processes torchrun starts with it."""

    arguments: tuple[str, ...]
    processes: int = 1


def command_lines(text: str) -> list[Line]:
    """Every command line of the project in a shell script; comments are left out and continued lines joined."""
    joined = re.sub(r"\\\n\s*", " ", text)
    found = []
    for line in joined.splitlines():
        words = shlex.split(line, comments=True) if line.strip() and not line.lstrip().startswith("#") else []
        for part in _parts(words):
            door = _door(part)
            if door is not None:
                found.append(Line(door, _processes(part)))
    return found


def _parts(words: list[str]) -> list[list[str]]:
    """The simple commands of a line."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word.rstrip(";") in OPERATORS or word in OPERATORS:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def _door(words: list[str]) -> tuple[str, ...] | None:
    """The command and its arguments; None for what is no command line of the project."""
    for place in range(len(words)):
        if words[place] in ("tempflow/train.py", "tempflow-train"):
            return ("train", *words[place + 1 :])
        first = place == 0 or words[place - 1] in ("-m", "srun")
        if words[place] == "tempflow" and first:
            return tuple(words[place + 1 :])
    return None


def _processes(words: list[str]) -> int:
    numbers = dict(word.removeprefix("--").split("=", 1) for word in words if re.match(r"--n\S+=", word))
    nodes = numbers.get("nnodes", "1")
    return int(numbers.get("nproc-per-node", 1)) * (int(nodes) if nodes.isdecimal() else 2)
