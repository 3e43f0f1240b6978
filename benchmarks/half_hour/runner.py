"""Runs parts one after the other, each a process group with a time limit; what became of them is written at once.

A folder holds, for each part, NAME.jsonl (its rows, as it wrote them) and NAME.log (what it printed); `parts.jsonl`
says how each process ended, the last row of a part counts: it is `unfinished` from its start on, so that a call that is
killed loses nothing. While minutes are left, and in a later call with the same folder, commit and device, parts whose
ending is final are left alone; those that ran out of time, or ended unfinished, are run again; some go on from their
rows.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from half_hour.parts import Part
from importable import cache_settings
from machine.environment import environment

DONE, FAILED, CRASHED, HUNG, SKIPPED = "done", "failed", "crashed", "hung", "skipped"
UNFINISHED, OUT_OF_TIME, NOT_RUN = "unfinished", "out of time", "not run"
FINAL = (DONE, FAILED, CRASHED, HUNG, SKIPPED)
EXITS = {0: DONE, 77: SKIPPED, 75: UNFINISHED}
"""Exit status of a part's process -> its ending; any other is FAILED, a signal CRASHED."""
LEAST = 8.0
"""seconds that are worth starting a part for"""
CLOSING = 10.0
"""seconds kept for the page"""
PASSES = 6
"""over the parts that are not finished, in one call"""
STUCK = 2
"""times that a part may reach its own limit without a row to go on from; a first time may have filled the cache only"""
SIGNALS = (signal.SIGTERM, signal.SIGINT)
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1


class Stopped(BaseException):
    """A signal asks the command to end; its number is the argument."""


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Within this context the first SIGTERM or SIGINT raises `Stopped`; further ones disturb nothing."""

    def stop(number: int, frame: object) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent(parent: int) -> None:
    """In a new process: it is killed when its parent is gone, which could have ended it (Linux alone)."""
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)


@dataclass(frozen=True)
class Session:
    """One call of the command."""

    folder: Path
    device: str
    tiny: bool
    deadline: float
    """on the monotonic clock"""
    patience: float = 1.0
    """factor on the limits of parts, which are a GPU machine's"""

    def left(self) -> float:
        return self.deadline - CLOSING - time.monotonic()

    def identity(self) -> dict[str, Any]:
        """What rows of parts must share to belong together."""
        known = environment(self.device)
        return {name: known[name] for name in ("device", "commit", "torch")} | {"tiny": self.tiny}


def rows_of(file: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file; a line that a killed process left half written is left out."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def endings(session: Session) -> dict[str, dict[str, Any]]:
    """Part -> the row of how it last ended, of this commit and device."""
    identity = session.identity().items()
    return {row["part"]: row for row in rows_of(session.folder / "parts.jsonl") if identity <= row.items()}


def run_parts(
    session: Session, parts: Iterable[Part], again: Iterable[str] = (), after: Callable[[], object] = lambda: None
) -> None:
    """Runs what has no final ending yet, unfinished parts last, and the parts named in `again` in any case; then what
    is not finished, as long as there is time. `after` is called after every part.

    Raises:
        Stopped: within `stoppable`; the part under way is ended and recorded as unfinished.
    """
    session.folder.mkdir(parents=True, exist_ok=True)
    known, waiting = endings(session), []
    for part in sorted(parts, key=lambda part: known.get(part.name, {}).get("ending") == UNFINISHED):
        anew = part.name in again or part.name not in known
        if not anew and known[part.name]["ending"] in FINAL:
            print(f"== {part.name}: {known[part.name]['ending']} in an earlier call", flush=True)
            continue
        waiting.append(part)
        if anew:
            _forget(session, part)
            known.pop(part.name, None)
    for turn in range(PASSES):
        for part in waiting:
            if turn and session.left() < LEAST:
                return
            known[part.name] = _run_and_record(session, part, known.get(part.name, {}))
            after()
        waiting = [part for part in waiting if known[part.name]["ending"] not in FINAL]


def _forget(session: Session, part: Part) -> None:
    """Rows of another commit, or that will be there twice."""
    for kind in ("jsonl", "log"):
        (session.folder / f"{part.name}.{kind}").unlink(missing_ok=True)


def _run_and_record(session: Session, part: Part, before: dict[str, Any]) -> dict[str, Any]:
    """How it ended; from its start on it is on record, so that its rows are known to be of this commit."""
    if session.left() < LEAST:
        ended = {"ending": OUT_OF_TIME, "seconds": 0.0, "status": None, "last": "not started"}
        _record(session, part, ended | {"stuck": before.get("stuck", 0)})
        return ended
    if not part.resumes:
        _forget(session, part)
    began = {"ending": UNFINISHED, "seconds": 0.0, "status": None, "last": "cut off", "stuck": before.get("stuck", 0)}
    _record(session, part, began)
    try:
        ended = began | run_part(session, part, began["stuck"])
    except Stopped as stopped:
        _record(session, part, began | {"last": f"stopped by {signal.Signals(stopped.args[0]).name}"})
        raise
    _record(session, part, ended)
    return ended


def _record(session: Session, part: Part, ended: dict[str, Any]) -> None:
    row = {"part": part.name, **ended, **environment(session.device), **session.identity()}
    with (session.folder / "parts.jsonl").open("a", encoding="utf-8") as out:
        out.write(json.dumps(row) + "\n")


def run_part(session: Session, part: Part, stuck: int = 0) -> dict[str, Any]:
    """One part in a process group of its own: its ending, seconds, exit status and last words.

    Args:
        stuck: how often it has reached its own limit without progress.
    """
    own, started, file = part.limit * session.patience, time.monotonic(), session.folder / f"{part.name}.log"
    limit, rows = min(own, session.left()), _count(session, part)
    print(f"== {part.name}: {part.told} (at most {limit:.0f} s)", flush=True)
    process = status = None
    try:
        with file.open("a", encoding="utf-8") as log:
            process = subprocess.Popen(_command(session, part, limit), stdout=log, stderr=subprocess.STDOUT,
                                       start_new_session=True, env=_surroundings(session),
                                       preexec_fn=functools.partial(end_with_parent, os.getpid()))  # fmt: skip
        status = process.wait(timeout=limit)
        ending = EXITS.get(status, CRASHED if status < 0 else FAILED)
    except subprocess.TimeoutExpired:
        ending = UNFINISHED if limit == own else OUT_OF_TIME
    finally:
        if process is not None:
            _end(process)
    if status is None and ending == UNFINISHED:  # it reached a limit of its own
        stuck = 0 if part.resumes and _count(session, part) > rows else stuck + 1
        ending = HUNG if stuck >= STUCK else UNFINISHED
    words = " ".join(file.read_text(encoding="utf-8", errors="replace").split("\n")[-4:]).strip()
    seconds = round(time.monotonic() - started, 1)
    print(f"== {part.name}: {ending} after {seconds:.0f} s", flush=True)
    return {"ending": ending, "seconds": seconds, "status": status, "last": words[-300:], "stuck": stuck}


def _count(session: Session, part: Part) -> int:
    return len(rows_of(session.folder / f"{part.name}.jsonl"))


def _command(session: Session, part: Part, limit: float) -> list[str]:
    tiny = ["--tiny"] if session.tiny else []
    return [sys.executable, *part.program, part.name, "--device", session.device, "--folder", str(session.folder),
            "--seconds", f"{limit:.0f}", *tiny]  # fmt: skip


def _surroundings(session: Session) -> dict[str, str]:
    """A kept compilation cache; on a CPU the Triton kernels are interpreted."""
    interpreted = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if session.device == "cpu" else {}
    return os.environ | cache_settings(session.folder / "cache") | interpreted


def _end(process: subprocess.Popen) -> None:
    """Ends the process with all its children: compilers and sanitizers have some."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
