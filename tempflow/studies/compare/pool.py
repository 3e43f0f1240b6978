"""Runs as child processes of the normal training command, as many at a time as there are places."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from tempflow.common.errors import BadInput
from tempflow.common.say import say
from tempflow.common.stopping import STOPPING, WRONG
from tempflow.studies.compare.jobs import Job, Machine

PATIENCE = 30
"""seconds that an interrupted run has to end"""


@dataclass(frozen=True)
class Failure:
    """A run that ended with an error."""

    job: Job
    code: int
    line: str
    """the last that it said"""

    def describe(self) -> str:
        return f"run {self.job.run}, seed {self.job.seed}, failed (exit code {self.code}): {self.line}"


def run_jobs(jobs: Sequence[Job], machine: Machine, places: int, pause: float = 1.0) -> list[Failure]:
    """Runs all that are not finished, in their order; a failed one is told of, and the others go on.

    Raises:
        KeyboardInterrupt: after a signal that asks to end, when all children have been interrupted and have ended.
    """
    pool = _Pool(machine, places, [job for job in jobs if not job.is_finished()])
    if len(pool.waiting) < len(jobs):
        say(f"{len(jobs) - len(pool.waiting)} of {len(jobs)} runs are finished already")
    bar = tqdm(total=len(jobs), initial=_done(jobs), unit="run", file=sys.stderr, dynamic_ncols=True,
               bar_format="{percentage:3.0f}% |{bar:20}| {elapsed} gone, {remaining} left{postfix}")  # fmt: skip
    with bar, STOPPING.listening("the same command goes on with it"), STOPPING.noting(pool.kill):
        try:
            while pool.goes_on() and not STOPPING.asked_by:  # noted, since what is raised may lose a run being started
                time.sleep(pause)
                _show(bar, jobs, pool)
        finally:
            _interrupt(child for _, child in pool.running.values())
        if STOPPING.asked_by:
            raise KeyboardInterrupt(STOPPING.asked_by)
    return pool.failures


@dataclass
class _Pool:
    """Which runs wait, and which of them is at which place."""

    machine: Machine
    places: int
    waiting: list[Job]
    running: dict[int, tuple[Job, subprocess.Popen]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    def goes_on(self) -> bool:
        """Takes leave of runs that have ended, and fills free places; whether any run is under way."""
        for place in [place for place, (_, child) in self.running.items() if child.poll() is not None]:
            self.failures += _ended(*self.running.pop(place))
        for place in sorted(set(range(self.places)) - self.running.keys())[: len(self.waiting)]:
            job = self.waiting.pop(0)
            if changed := _changed(job):
                self.failures += [changed]
            else:
                self.running[place] = job, _start(job, self.machine.environment(place))
        return bool(self.running or self.waiting)

    def kill(self) -> None:
        """Ends all that are under way by force."""
        for _, child in self.running.values():
            child.kill()


def _show(bar: tqdm, jobs: Sequence[Job], pool: _Pool) -> None:
    """Progress; a log need not hear that nothing has changed."""
    bar.set_postfix_str(f"{len(pool.running)} under way, {len(pool.waiting)} waiting", refresh=False)
    before, bar.n = bar.n, _done(jobs)
    if bar.n != before or sys.stderr.isatty():
        bar.refresh()


def _done(jobs: Sequence[Job]) -> float:
    """Runs done, those under way in part."""
    return round(sum(job.done() for job in jobs), 3)


def _start(job: Job, environment: dict[str, str]) -> subprocess.Popen:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        return subprocess.Popen(job.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)


def _ended(job: Job, child: subprocess.Popen) -> list[Failure]:
    """Marks a run as finished, or tells of its failure."""
    if child.returncode == 0:
        job.finish()
        return []
    return [_told(Failure(job, child.returncode, last_line(job)))]


def _changed(job: Job) -> Failure | None:
    """The failure of a run whose files were changed since the study began: its seeds would not be of one kind."""
    try:
        line = "a preset or file of its stack was changed since the study began" if job.has_changed() else ""
    except BadInput as error:
        line = str(error)
    return _told(Failure(job, WRONG, line)) if line else None


def _told(failure: Failure) -> Failure:
    tqdm.write(f"tempflow: {failure.describe()}", file=sys.stderr)
    return failure


def last_line(job: Job) -> str:
    """The last that a run said; progress bars end their lines by a carriage return."""
    text = job.log.read_bytes().decode(errors="replace").replace("\r", "\n")
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")


def _interrupt(children: Iterable[subprocess.Popen]) -> None:
    """Ends children as Ctrl-C would, and those that do not listen by force."""
    left = [child for child in children if child.poll() is None]
    for child in left:
        child.send_signal(signal.SIGINT)
    for child in left:
        try:
            child.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
