"""What a kind of fault is, as data: what is done to a run, and what must hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from faults.child import Job, Trouble
from faults.processes import RANK, Started, alone, several, typed

SHARES = ("model.train=full", "parallel.shard=full", "parallel.merged=sharded", "explore.noises=1",
          "explore.siblings=2", "explore.forks=[0]", "sample.steps=3", "learn.rows=1", "eval.prompts=2",
          "eval.steps=2")  # fmt: skip
WAYS: dict[str, Callable[[Job], Started]] = {
    "one process": alone,
    "2 ranks": several,
    "2 ranks, shares": partial(several, more=SHARES),
    "2 ranks, restarts": partial(typed, ranks=2, restarts=3, script=RANK),
    "command": typed,
    "torchrun command": partial(typed, ranks=2),
}
"""how a run is started: forked from a process with all imports done, or (the last three) typed by a user; with shares
each of 2 ranks holds half of a network that is trained in full"""

EQUAL, FINISHED, REFUSED = "equal", "finished", "refused"
"""What a run that goes on afterwards comes to: the weights and metrics of an undisturbed one, bit for bit; its end,
with other weights, since the fault changed what was computed; or nothing, since nothing is left to go on from."""


@dataclass
class Scene:
    """What a fault may touch."""

    run: Path
    """the run's folder"""
    started: Started
    start_another: Callable[[], Started]
    """another process with the same arguments, at work on the same folder"""
    others: list[Started] = field(default_factory=list)
    server: object = None
    """the scorer's server, where there is one"""


@dataclass(frozen=True)
class Ends:
    """How the disturbed run must end.

    Args:
        codes: exit codes of the process, or of the first rank (None: it left none, a signal ended it); none: any.
        words: regular expression, case ignored, of a line that begins with `tempflow:`.
        within: seconds from the fault to the end of the last process.
        lost: iterations that may be lost beyond the one in flight.
    """

    codes: tuple[int | None, ...]
    words: str = ""
    within: float = 15.0
    lost: int = 0


@dataclass(frozen=True)
class Fault:
    """A kind of fault."""

    name: str
    ends: Ends
    way: str = "one process"
    settings: tuple[str, ...] = ("run.save_every=100",)
    """by default nothing is saved but because of the fault"""
    at: str = "iteration 3"
    """the moment of the first rank: `set-up`, `iteration 3`, `evaluation`, `saving`, `start`, so many seconds such as
    `2 s`; or drawn at random: `any` of its life, `loop`, from the first iteration on"""
    do: Callable[[Scene], None] | None = None
    """what is then done from outside"""
    troubles: tuple[Trouble, ...] = ()
    prepared: Callable[[Path], None] | None = None
    """what is done to the folder of a run that was killed in iteration 6, with checkpoints of 2 and 4; the fault is
    then met by going on"""
    served: bool = False
    """scores come from a server"""
    mend: Callable[[Scene], None] = lambda scene: None
    """what the user does before going on"""
    then: str = EQUAL
    disk: int = 0
    """size of a small disk for the run, MiB; 0: no disk of its own"""
    environment: tuple[tuple[str, str], ...] = ()
    """variables that the user sets"""
    tries: int = 1
    """how often it is tried in one round of the table"""


@dataclass(frozen=True)
class Room:
    """Kinds that belong together."""

    name: str
    faults: tuple[Fault, ...]
