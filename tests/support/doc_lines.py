"""Command lines of the project in shell text: what is parsed, whether or not it is run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath

OPERATOR, REDIRECTION = re.compile(r"[();|&]+"), re.compile(r"[<>&|]*[<>][<>&|]*")
BEFORE = re.compile(r"if|then|else|while|until|do|!|\{|time|exec|nohup|env|[A-Za-z_]\w*=.*")
"""What may stand before the first word of a command."""


@dataclass(frozen=True)
class Line:
    """`COMMAND ...` of the project, and how many processes torchrun starts with it."""

    arguments: tuple[str, ...]
    processes: int = 1


def command_lines(text: str) -> list[Line]:
    """Every command line of the project in a shell script; comments are left out and continued lines joined."""
    joined = re.sub(r"\\\n\s*", " ", text)
    parts = [part for line in joined.splitlines() for part in _parts(line)]
    doors = [(part, _door(part)) for part in parts]
    return [Line(door, _processes(part)) for part, door in doors if door is not None]


def _parts(line: str) -> list[list[str]]:
    """The simple commands of a line, without what stands before them and where their words go."""
    parts: list[list[str]] = [[]]
    words = _words(line)
    for word in words:
        if REDIRECTION.fullmatch(word):
            parts[-1] = parts[-1][:-1] if parts[-1] and parts[-1][-1] in "012" else parts[-1]
            next(words, None)
        elif OPERATOR.fullmatch(word):
            parts.append([])
        elif parts[-1] or not BEFORE.fullmatch(word):
            parts[-1].append(word)
    return parts


def _words(line: str) -> Iterator[str]:
    """The words of a line, operators apart from what they touch."""
    reader = shlex.shlex("" if line.lstrip().startswith("#") else line, posix=True, punctuation_chars=True)
    reader.whitespace_split = True
    return iter(reader)


def _door(words: list[str]) -> tuple[str, ...] | None:
    """The command and its arguments; None for what is no command line of the project."""
    in_image = words[:2] == ["docker", "run"] and "--entrypoint" not in words  # the image has the project's own
    anywhere = in_image or words[:1] == ["srun"]
    for place, word in enumerate(words):
        if word == "tempflow/train.py" or PurePath(word).name == "tempflow-train":
            return ("train", *words[place + 1 :])
        first = place == 0 and PurePath(word).name == "tempflow"
        if first or (word == "tempflow" and (anywhere or words[place - 1] == "-m")):
            return tuple(words[place + 1 :])
    return None


def _processes(words: list[str]) -> int:
    numbers = dict(word.removeprefix("--").split("=", 1) for word in words if re.match(r"--n\S+=", word))
    nodes = numbers.get("nnodes", "1")
    return int(numbers.get("nproc-per-node", 1)) * (int(nodes) if nodes.isdecimal() else 2)
