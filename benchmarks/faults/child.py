"""What happens in a process of the harness: a training run, with whatever shall go wrong in it, and its exit."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from faults import scorer

from tempflow import train
from tempflow.commands.train import main
from tempflow.run import checkpoint
from tempflow.run.evaluation import Evaluator

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)
PAUSE = 0.5
"""seconds that a process rests at the moment a fault waits for, so that the fault comes within it"""


@dataclass
class Inside:
    """What a process knows of itself: where it is, and who it is."""

    folder: Path
    """where it leaves word for the harness"""
    rank: int
    iteration: int = 0
    """the one under way, from 1; 0 before the loop"""
    pause_at: str | None = None


@dataclass(frozen=True)
class Trouble:
    """Something that goes wrong inside a process.

    Args:
        strike: called with `Inside` and `value` in each process concerned before its run; it lays the trap.
        rank: the only process concerned; None for all.
    """

    strike: Callable[[Inside, Any], None]
    value: Any = None
    rank: int | None = None


@dataclass(frozen=True)
class Job:
    """A run: arguments of the command, and what goes wrong in it."""

    folder: Path
    """of logs and word to the harness"""
    arguments: tuple[str, ...]
    troubles: tuple[Trouble, ...] = ()
    pause_at: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


def enter(job: Job) -> NoReturn:
    """The life of a process that was just forked from one in which nothing has run; ends it."""
    rank = int(os.environ.get("RANK", "0"))
    name = f"rank{rank}"
    _own_streams(job.folder / f"{name}.txt")
    _as_new()
    (job.folder / f"{name}.pid").write_text(str(os.getpid()))
    inside = Inside(job.folder, rank, pause_at=job.pause_at)
    code = _exit_code(lambda: _run(job, inside))
    (job.folder / f"{name}.code").write_text(str(code))
    os._exit(code)


def _run(job: Job, inside: Inside) -> int:
    os.environ.update(job.environment)
    _watch(inside)
    for trouble in job.troubles:
        if trouble.rank in (None, inside.rank):
            trouble.strike(inside, trouble.value)
    return main(job.arguments)


def _exit_code(work: Callable[[], int]) -> int:
    """As the interpreter would end: tracebacks printed, threads waited for."""
    code = 1
    try:
        code = work()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    try:
        threading._shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    return code


def _own_streams(path: Path) -> None:
    """Standard output and error go to a file, and nothing is read."""
    file, nothing = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (file, 1), (file, 2)):
        os.dup2(source, target)


def _as_new() -> None:
    """Signals as the kernel gives them to a new program."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def say_moment(inside: Inside, moment: str) -> None:
    """Leaves word that this process has come to a moment; rests there where a fault waits for it."""
    with (inside.folder / f"rank{inside.rank}.moments").open("a") as file:
        file.write(f"{moment}\n")
    if moment == inside.pause_at:
        time.sleep(PAUSE)


def _watch(inside: Inside) -> None:
    """Word at set-up, at each iteration, evaluation and saving."""
    before(train, "set_up", lambda *_: say_moment(inside, "set-up"))
    before(Evaluator, "evaluate", lambda *_: say_moment(inside, "evaluation"))
    before(checkpoint, "save", lambda *_: say_moment(inside, "saving"))

    def begun(trainer: Any, iteration: int) -> None:
        inside.iteration = iteration + 1
        say_moment(inside, f"iteration {iteration + 1}")

    before(train, "train_step", begun)
    scorer.Judge.trouble = None


def before(owner: Any, name: str, work: Callable[..., None]) -> None:
    """Has `work` called with the arguments of `owner.name` before it, each time."""
    wrapped = getattr(owner, name)

    def both(*arguments: Any, **named: Any) -> Any:
        work(*arguments)
        return wrapped(*arguments, **named)

    setattr(owner, name, both)
