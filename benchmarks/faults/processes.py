"""Real processes for runs: forked from one that has imported everything, alone or by torchrun; or begun from nothing.

A fork spares the 10 seconds of imports, nothing else: process, signals, memory, files and exit are its own. Under
torchrun the launcher is torchrun's own code, whose ranks are forked in place of being started by name.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

from faults import child
from faults.child import SIGNALS, Job, enter
from importable import ROOT
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing import api

SCRIPT, RANK = ROOT / "tempflow" / "train.py", ROOT / "benchmarks" / "faults" / "rank.py"
POLL = 0.01
"""seconds between two looks at a process"""


@dataclass
class Started:
    """A run under way: the process that the user started, and the ranks below it, if it is torchrun."""

    pid: int
    folder: Path
    began: float
    code: int | None = None
    """128 + n where signal n ended it"""
    known: set[int] = field(default_factory=set)
    """processes below it that have been seen"""

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = _code(status) if pid else None
        return self.code

    def wait(self, until: float) -> int | None:
        """The exit code, or None where it still runs at `until` (time.monotonic)."""
        while self.poll() is None and time.monotonic() < until:
            time.sleep(POLL)
        return self.code

    def process(self, target: str) -> int:
        """The number of `run` (what the user started), `rank0` or `rank1`, which may have to begin first."""
        path = self.folder / f"{target}.pid"
        while target != "run" and not (path.exists() and path.read_text()) and self.poll() is None:
            time.sleep(POLL)
        return self.pid if target == "run" else int(path.read_text())

    def moments(self, rank: int = 0) -> list[str]:
        """What a rank has come to so far."""
        path = self.folder / f"rank{rank}.moments"
        return path.read_text().splitlines() if path.exists() else []

    def look(self) -> None:
        """Remembers all processes below it, which stay when it dies."""
        parents = {int(path.name): _parent(path) for path in Path("/proc").iterdir() if path.name.isdigit()}
        found = {self.pid}
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        self.known |= found - {self.pid}

    def living(self) -> list[int]:
        """Processes below it that run yet, zombies not counted."""
        self.known |= {int(path.read_text() or 0) for path in self.folder.glob("rank*.pid")} - {0, self.pid}
        return [pid for pid in self.known if _lives(pid)]

    def kill(self) -> None:
        """Ends all of it at once."""
        if self.code is None:
            self.look()
        for pid in {self.pid, *self.living()}:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.wait(time.monotonic() + 10)


def _parent(process: Path) -> int:
    """The parent of a process in /proc; 0 where it is gone."""
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def fork(work: Callable[[], NoReturn]) -> int:
    """A child in a session of its own."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        work()
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def alone(job: Job) -> Started:
    """One process, without torchrun."""
    return Started(fork(lambda: enter(job)), job.folder, time.monotonic())


class ForkedRank:
    """What torchrun holds of a rank, `subprocess.Popen` in small, for one that is forked."""

    def __init__(self, job: Job, environment: dict[str, str]):
        def begin() -> NoReturn:
            os.environ.update(environment)
            enter(job)

        self.proc, self.pid, self.returncode = self, fork(begin), None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("rank", timeout)
            time.sleep(POLL)
        return self.returncode

    def close(self, death_sig: int | None = None) -> None:
        try:
            os.killpg(self.pid, death_sig or signal.SIGTERM)
        except ProcessLookupError:
            self.poll()


def several(job: Job, ranks: int = 2, more: tuple[str, ...] = ()) -> Started:
    """torchrun and its ranks, with `more` settings."""
    job = replace(job, arguments=(*job.arguments, *more))

    def begin() -> NoReturn:
        _write_to(job.folder / "torchrun.txt")
        api.get_subprocess_handler = lambda *, env, **_: ForkedRank(job, env)
        torchrun.main(["--standalone", f"--nproc-per-node={ranks}", str(SCRIPT)])
        os._exit(0)

    return Started(fork(begin), job.folder, time.monotonic())


def typed(job: Job, ranks: int = 1, restarts: int = 0, script: Path = SCRIPT) -> Started:
    """The command as a user types it, imports and all; no trouble of the job comes.

    Args:
        script: the trainer's, or RANK, which leaves word of its moments.
    """
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += [f"--max-restarts={restarts}", f"--log-dir={job.folder}", "--redirects=3"]
    command += [str(script), *((str(job.folder), str(job.pause_at)) if script == RANK else ()), *job.arguments]
    path = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), **job.environment}

    def begin() -> NoReturn:
        _write_to(job.folder / ("rank0.txt" if ranks == 1 else "torchrun.txt"))
        for number in (signal.SIGINT, *SIGNALS):
            signal.signal(number, signal.SIG_DFL)
        os.execvpe(command[0], command, environment)

    return Started(fork(begin), job.folder, time.monotonic())


def _write_to(path: Path) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(file, 1)
    os.dup2(file, 2)


def warm_up(job: Job) -> None:
    """Imports what an undisturbed run imports, so that forked runs need not.

    Raises:
        RuntimeError: that run failed; with its words.
    """
    listing = job.folder / "modules.txt"

    def begin() -> NoReturn:
        child.main = _listing(child.main, listing)
        enter(job)

    started = Started(fork(begin), job.folder, time.monotonic())
    if started.wait(time.monotonic() + 300) != 0:
        raise RuntimeError((job.folder / "rank0.txt").read_text())
    for name in listing.read_text().splitlines():
        if name not in sys.modules:
            try:
                importlib.import_module(name)
            except (ImportError, AttributeError, ValueError):
                continue  # made while running, not to be imported by name


def _listing(work: Callable[..., int], path: Path) -> Callable[..., int]:
    def both(*arguments: object) -> int:
        code = work(*arguments)
        path.write_text("\n".join(sys.modules))
        return code

    return both
