"""What trackers are told of a run, and when: each line of metrics.jsonl once, whether or not the run was resumed.

How far each has come is kept in `trackers.json`. A resumed run repeats iterations after its checkpoint, bit for bit;
what a tracker has of them it is not told again. What it lacks of the iterations before, since it was not asked for, or
failed, it is told when the run goes on.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tempflow.common.errors import BadInput
from tempflow.common.files import write_atomically
from tempflow.common.say import say
from tempflow.common.stopping import SIGNALS
from tempflow.records.gallery import as_grid, read_small
from tempflow.records.trackers.adapters import TRACKERS, Grid, Opened, TrackedRun

STATE = "trackers.json"
KINDS = {"iteration": "grad_norm", "evaluation": "scores_missing"}
"""kind of a line -> a field that no other kind has"""
LONGEST = 2000
"""characters of a caption"""


class Trackers:
    """The trackers of a run. None of them can end it: one that fails is told nothing more, after a warning.

    Args:
        names: words of `TRACKERS`.
        settings: of the run, which trackers show beside its curves.
    """

    def __init__(self, folder: Path, names: Sequence[str] = (), project: str = "", settings: Mapping | None = None):
        self.folder, self.names, self.project, self.settings = folder, names, project, settings or {}
        self.at_work: dict[str, Opened] = {}
        self.prompts: list[str] = []
        self.id, self.told = _read_state(folder / STATE)

    def begin(self, earlier: Iterable[Mapping[str, Any]]) -> None:
        """Begins or goes on, and tells what is missing of the earlier lines of a resumed run."""
        run = TrackedRun(self.folder, self.id, self.project, self.settings)
        for name in self.names:
            self._begin(name, run)
        for line in earlier:
            self.tell(line)

    def tell(self, line: Mapping[str, Any]) -> None:
        """Tells each tracker a line of the metrics that it has not been told; with an evaluation come its pictures."""
        self.prompts = line.get("picture_prompts", self.prompts)
        kind, step = next((kind for kind, field in KINDS.items() if field in line), None), line["step"]
        waiting = [name for name in self.at_work if kind and step > self.told.get(name, {}).get(kind, -1)]
        if not waiting:
            return
        numbers, grid = numbers_of(line, kind), self._grid(step) if kind == "evaluation" else None
        for name in waiting:
            if self._attempt(name, lambda name=name: self.at_work[name].log(step, numbers, grid)):
                self.told.setdefault(name, {})[kind] = step
        self._keep_state()

    def close(self) -> None:
        """Ends them all, for which one may wait until what it was told is sent."""
        for name, opened in self.at_work.items():
            self._attempt(name, opened.close)
        self.at_work = {}

    def _begin(self, name: str, run: TrackedRun) -> None:
        with _own_signals(), _nobody_to_ask():
            try:
                self.at_work[name] = TRACKERS[name].begin(run)
            except (Exception, SystemExit) as error:
                _warn(name, error, f"{TRACKERS[name].hint}; the run goes on without it")

    def _attempt(self, name: str, work: Callable[[], object]) -> bool:
        try:
            work()
        except (Exception, SystemExit) as error:  # of packages that know many ways to fail
            self.at_work = {other: opened for other, opened in self.at_work.items() if other != name}
            _warn(name, error, "the run goes on without it; run.resume=true will tell it what it lacks")
            return False
        return True

    def _grid(self, step: int) -> Grid | None:
        """The pictures of an evaluation, where they are kept."""
        try:
            found = read_small(self.folder, [step], len(self.prompts)) if self.prompts else {}
        except BadInput as error:
            say(f"warning: {error}")
            return None
        caption = "\n".join(f"{number}: {prompt}" for number, prompt in enumerate(self.prompts, 1))[:LONGEST]
        return Grid(as_grid(found[step]), caption) if step in found else None

    def _keep_state(self) -> None:
        try:
            write_atomically(self.folder / STATE, json.dumps({"id": self.id, "told": self.told}).encode())
        except OSError as error:  # the line is in metrics.jsonl; a full disk ends the run elsewhere
            say(f"warning: {STATE} cannot be written ({error.strerror}); a resumed run may tell trackers lines twice")


def numbers_of(line: Mapping[str, Any], kind: str) -> dict[str, float]:
    """The numbers of a line, each under a name that no other line of its step has.

    Those of an evaluation that are no scores get `evaluation/` before their names.
    """
    scores = ("reward_test", "gold")
    named = {name if kind == "iteration" or name.startswith(scores) else f"evaluation/{name}": value
             for name, value in (line | line.get("kinds", {})).items() if name not in ("step", "kinds")}  # fmt: skip
    return flat_numbers(named)


def flat_numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a row under one name each: {"phase_seconds": {"tails": 1.0}} becomes phase_seconds/tails."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        flat |= {name: value} if not isinstance(value, dict | list) else {f"{name}/{key}": part for key, part in parts}
    return {name: value for name, value in flat.items() if isinstance(value, int | float)}


def _read_state(path: Path) -> tuple[str, dict[str, dict[str, int]]]:
    """The run's name among those of trackers, a new one where there is none, and how far each tracker has come."""
    try:
        state = json.loads(path.read_bytes())
        return str(state["id"]), {name: dict(steps) for name, steps in state["told"].items()}
    except FileNotFoundError:
        return secrets.token_hex(4), {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput("run.trackers", path, "is no record of trackers; remove it, and they begin anew") from error


@contextmanager
def _own_signals() -> Iterator[None]:
    """Gives signals back to whom they were: swanlab takes Ctrl-C, by which a run is asked to finish its iteration."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and threading.current_thread() is threading.main_thread():
                signal.signal(number, handler)


@contextmanager
def _nobody_to_ask() -> Iterator[None]:
    """Ends questions at once, where wandb and swanlab without an account would wait for one."""
    before = sys.stdin
    with open(os.devnull) as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = before


def _warn(name: str, error: BaseException, hint: str) -> None:
    words = " ".join(str(error).split())[:300] or type(error).__name__
    say(f"warning: run.trackers={name}: {words}; {hint}")
