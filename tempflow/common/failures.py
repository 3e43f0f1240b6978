"""Failures that are no input of the user: a line for the screen, the traceback for a file."""

from __future__ import annotations

import time
import traceback
from pathlib import Path

import torch

from tempflow.common.errors import OneLine

MEMORY = "lower learn.rows, reward.rows or tails.rows"


def as_line(error: BaseException) -> tuple[str, object, str]:
    """Field, value and hint of a line about any exception."""
    if isinstance(error, OneLine):
        return error.field, error.value, error.hint
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "memory", "exhausted", f"{MEMORY}{_first_words(error)}"
    if isinstance(error, OSError) and error.filename is not None:
        return "file", error.filename, error.strerror or type(error).__name__
    return "failure", type(error).__name__, _first_words(error).lstrip(" (").rstrip(")") or "it does not say why"


def _first_words(error: BaseException) -> str:
    words = str(error).strip()
    return f" ({words.splitlines()[0][:300]})" if words else ""


def keep_traceback(folder: Path, rank: int, error: BaseException) -> Path | None:
    """Appends the traceback to `error.txt`, of another process than the first to `error.rankN.txt`; None where that
    cannot be written."""
    path = folder / ("error.txt" if rank == 0 else f"error.rank{rank}.txt")
    words = "".join(traceback.format_exception(error))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{words}\n")
    except OSError:
        return None
    return path
