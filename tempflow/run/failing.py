"""What a run that failed says: one line, and where the traceback is."""

from __future__ import annotations

import re
import time
from pathlib import Path

from tempflow.common.errors import OneLine
from tempflow.common.failures import as_line, keep_traceback
from tempflow.common.say import say
from tempflow.parallel.environment import read_place
from tempflow.parallel.ranks import describe_loss
from tempflow.settings.fields import Config

SOON = 2.0
"""seconds in which a process that fails leaves word of it"""


def tell_failure(config: Config, error: BaseException) -> None:
    """Says in a line what ended the run in this process; the traceback goes to the run's folder."""
    folder, place = Path(config.run.dir).expanduser(), read_place()
    line = str(error if isinstance(error, OneLine) else OneLine(*as_line(error)))
    lost = describe_loss(_root(error)) if isinstance(_root(error), RuntimeError) else None
    if lost:
        line = f"{lost}{_word_of_others(folder, place.rank)}; {line}"
    if not isinstance(_root(error), OneLine):
        path = keep_traceback(folder, place.rank, error)
        line += f" (traceback: {path})" if path else ""
    agreed = isinstance(error.__cause__, OneLine)  # then all processes are here, and the one that failed has said why
    say(line if place.rank == 0 else f"process {place.rank}: {line}", everywhere=not agreed)


def _root(error: BaseException) -> BaseException:
    """What an error came from in the end."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _word_of_others(folder: Path, own: int) -> str:
    """Which process failed first, and how, if it left word."""
    end, began = time.monotonic() + SOON, time.time()
    while True:
        found = [path for path in folder.glob("error*.txt") if began - path.stat().st_mtime < 10 * SOON]
        others = [path for path in found if _rank(path) != own]
        if others:
            first = min(others, key=lambda path: path.stat().st_mtime)
            words = first.read_text(encoding="utf-8").rstrip().splitlines()[-1]
            return f"; process {_rank(first)} failed ({words[:300]})"
        if time.monotonic() > end:
            return ""
        time.sleep(SOON / 20)


def _rank(path: Path) -> int:
    return int(re.search(r"\d+", path.name)[0]) if "rank" in path.name else 0
