"""Small runs: how they are started, and undisturbed and halted ones to compare with and to begin from."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from faults.child import Job
from faults.kinds import WAYS, Fault
from faults.processes import POLL, Started, warm_up
from faults.results import words
from faults.servers import SCORER

ITERATIONS, FIRST = 6, "iteration 1"
RANDOM = {"any": "", "loop": f"{FIRST} + "}
"""moments drawn at random, and from when on they count"""
IMPORTS = 12.0
"""seconds of imports, about"""
SETTINGS = ("explore.prompts=2", "explore.noises=2", "explore.siblings=3", "explore.forks=[0,3]", "sample.steps=5",
            "learn.rows=2", "learn.lr_schedule=constant", "eval.prompts=4", "eval.steps=4", "eval.pictures=2",
            "eval.every=3", "learn.ema_every=1", f"reward.name={SCORER}", "run.trackers=[]", "run.device=cpu",
            "run.keep_checkpoints=3")  # fmt: skip
"""A run of a few seconds: 4 trunks, 24 branches an iteration."""
PLAIN = {"2 ranks, restarts": "2 ranks", "torchrun command": "2 ranks", "command": "one process"}
"""how a run goes on afterwards, where not as before"""
SLOWEST = 120.0
"""seconds after which an undisturbed run counts as hung"""


class Bench:
    """A folder for trials, with an undisturbed run of each way to compare with."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder, seed
        self.seconds: dict[str, dict[str, float]] = {}
        torch.set_num_threads(1)
        warm_up(self.job("undisturbed/first", self.folder / "undisturbed" / "one process" / "run", "run.save_every=1"))

    def job(self, name: str, run: Path, *more: str, **parts: object) -> Job:
        """A run in `run` whose logs go to a new folder of that name."""
        logs = self.folder / name
        shutil.rmtree(logs, ignore_errors=True)
        logs.mkdir(parents=True)
        logs.chmod(0o777)  # a trial may be another user's
        arguments = ("digits", *SETTINGS, f"learn.iterations={ITERATIONS}", *more, f"run.dir={run}")
        return Job(logs, arguments, **parts)

    def undisturbed(self, way: str) -> Path:
        """The folder of a finished run; made once."""
        way = PLAIN.get(way, way)
        return self._made(way, "undisturbed", f"learn.iterations={ITERATIONS}", "run.save_every=1")

    def halted(self, way: str) -> Path:
        """The folder of a run with checkpoints of iterations 2 and 4 that was killed in its last one; made once."""
        way = PLAIN.get(way, way)
        run = self.folder / "halted" / way / "run"
        if not run.exists():
            last = f"iteration {ITERATIONS}"
            started = WAYS[way](self.job(f"halted/{way}/logs", run, "run.save_every=2", pause_at=last))
            while last not in started.moments() and started.poll() is None:
                time.sleep(POLL)
            started.kill()
        return run

    def prepare(self, faults: Iterable[Fault]) -> None:
        """Makes what trials compare with or begin from, so that several may be made at once."""
        for fault in faults:
            self.undisturbed(fault.way)
            if fault.prepared:
                self.halted(fault.way)
            if fault.at in RANDOM:
                self.duration(fault.way, fault.at)

    def moment(self, fault: Fault, draw: str) -> str:
        """When the fault comes, a random moment drawn within the length of an undisturbed run."""
        if fault.at not in RANDOM:
            return fault.at
        drawn = random.Random(f"{self.seed} {draw}").uniform(0, self.duration(fault.way, fault.at))
        return f"{RANDOM[fault.at]}{drawn:.2f} s"

    def duration(self, way: str, part: str) -> float:
        """Seconds of an undisturbed run, imports included where there are any, or of its loop."""
        plain = PLAIN.get(way, way)
        if plain not in self.seconds:
            self._made(plain, "timed", f"learn.iterations={ITERATIONS}", "run.save_every=1")
        return self.seconds[plain][part] + (IMPORTS if "command" in way and part == "any" else 0.0)

    def _made(self, way: str, kind: str, *more: str) -> Path:
        run = self.folder / kind / way / "run"
        if not run.exists():
            started = WAYS[way](self.job(f"{kind}/{way}/logs", run, *more))
            wait_for(FIRST, started)
            first = time.monotonic()
            if started.wait(started.began + SLOWEST) != 0:
                started.kill()
                raise RuntimeError("\n".join(words(started.folder)[-3:]))
            now = time.monotonic()
            self.seconds.setdefault(way, {"any": now - started.began, "loop": now - first})
        return run


def wait_for(moment: str, started: Started) -> None:
    """Until the first rank has come to it, or the run is over."""
    while moment not in ("", "start", *started.moments()) and started.poll() is None:
        if time.monotonic() > started.began + SLOWEST:
            return
        time.sleep(POLL)
