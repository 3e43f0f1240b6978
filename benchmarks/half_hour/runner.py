"""Runs parts one after the other, each a process group with a time limit; what became of them is written at once.

A folder holds, for each part, NAME.jsonl (its rows, as it wrote them) and NAME.log (what it printed); `parts.jsonl`
says how each process ended. A later call with the same folder, commit and device goes on: parts whose ending is final
are left alone; those that ran out of the whole's time, or ended unfinished, are run again; some go on from their rows.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
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


def run_parts(session: Session, parts: Iterable[Part], again: Iterable[str] = ()) -> None:
    """Runs what has no final ending yet, unfinished parts last, and the parts named in `again` in any case."""
    session.folder.mkdir(parents=True, exist_ok=True)
    known = endings(session)
    for part in sorted(parts, key=lambda part: known.get(part.name, {}).get("ending") == UNFINISHED):
        anew = part.name in again or part.name not in known
        if not anew and known[part.name]["ending"] in FINAL:
            print(f"== {part.name}: {known[part.name]['ending']} in an earlier call", flush=True)
            continue
        if anew or not part.resumes:
            for kind in ("jsonl", "log"):  # rows of another commit, or that will be there twice
                (session.folder / f"{part.name}.{kind}").unlink(missing_ok=True)
        _record(session, part, run_part(session, part))


def _record(session: Session, part: Part, ended: dict[str, Any]) -> None:
    print(f"== {part.name}: {ended['ending']} after {ended['seconds']:.0f} s", flush=True)
    row = {"part": part.name, **ended, **environment(session.device), **session.identity()}
    with (session.folder / "parts.jsonl").open("a", encoding="utf-8") as out:
        out.write(json.dumps(row) + "\n")


def run_part(session: Session, part: Part) -> dict[str, Any]:
    """One part in a process group of its own: its ending, seconds, exit status and last words."""
    left = session.left()
    if left < LEAST:
        return {"ending": OUT_OF_TIME, "seconds": 0.0, "status": None, "last": "not started"}
    own, started, file = part.limit * session.patience, time.monotonic(), session.folder / f"{part.name}.log"
    limit = min(own, left)
    print(f"== {part.name}: {part.told} (at most {limit:.0f} s)", flush=True)
    with file.open("a", encoding="utf-8") as log:
        process = subprocess.Popen(_command(session, part, limit), stdout=log, stderr=subprocess.STDOUT,
                                   start_new_session=True, env=_surroundings(session))  # fmt: skip
        try:
            status = process.wait(timeout=limit)
            ending = EXITS.get(status, CRASHED if status < 0 else FAILED)
        except subprocess.TimeoutExpired:
            status, ending = None, HUNG if limit == own else OUT_OF_TIME
        finally:
            _end(process)
    words = " ".join(file.read_text(encoding="utf-8", errors="replace").split("\n")[-4:]).strip()
    return {"ending": ending, "seconds": round(time.monotonic() - started, 1), "status": status, "last": words[-300:]}


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
