"""Which engine carries the tails: levels from plain calls to captured graphs, and proof that the chosen one works."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from tempflow.common.capture import CaptureBroken, CudaGraphs
from tempflow.common.errors import BadInput
from tempflow.common.say import say
from tempflow.explore.schedule import NoiseSchedule
from tempflow.explore.tails.compiled import AUTOTUNED, CompiledBlocks
from tempflow.explore.tails.engine import EagerEngine, Numerics, TailEngine, TailWork
from tempflow.explore.tails.recorded import BufferStore, Direct, Recorder, StaticEngine
from tempflow.explore.tails.solver import EXACT, TailSolver, tail_solvers
from tempflow.policy import Conditioning, Policy
from tempflow.settings.fields import TailConfig


@dataclass(frozen=True)
class Level:
    """How a network call of a tail is made."""

    compiled: bool
    """the repeated blocks are torch.compile's"""
    recorder: Callable[[torch.device], Recorder] | None
    """what repeats a call on fixed buffers; None makes calls of the branches that are under way only"""
    uncaptured: str = ""
    """where calls are captured in CUDA graphs, which keep their memory: the same level without them"""


LEVELS = {
    "eager": Level(False, None),
    "graph": Level(False, CudaGraphs, "eager"),
    "compile": Level(True, lambda device: Direct()),
    "compiled_graph": Level(True, CudaGraphs, "compile"),
}
AUTO = {"cuda": ("compiled_graph", "compile", "graph", "eager")}
"""What tails.level=auto tries in turn, per device; eager elsewhere."""
ONLY_COMPILED = {
    "fp8": "rounding inputs apart from the products costs more than 8-bit products save",
    "autotune": "kernels are chosen only in compiled blocks",
}
"""Settings that need a level that compiles, and why."""


@dataclass(frozen=True)
class Engines:
    """One for the branches of an iteration, one for evaluation."""

    level: str
    explore: tuple[TailEngine, ...]
    """V, one for each way from a branch to an image"""
    evaluate: EngineAtFirstUse
    """exact: Euler on every sigma, in the numerics of training"""


class EngineAtFirstUse:
    """The engine that `make` gives, compiled and captured when the first branches are to be finished: a run without
    evaluation never pays for it. `finish` also raises what `make` does."""

    def __init__(self, rows: int, make: Callable[[], TailEngine]):
        self.rows, self.make = rows, make

    @cached_property
    def engine(self) -> TailEngine:
        return self.make()

    @property
    def work(self) -> TailWork:
        return self.engine.work

    def finish(
        self, latents: Tensor, first_steps: Sequence[int], conditioning: Conditioning, schedule: NoiseSchedule
    ) -> None:
        self.engine.finish(latents, first_steps, conditioning, schedule)

    def halve(self, tried: int) -> bool:
        return self.engine.halve(tried)


@dataclass(frozen=True)
class Trial:
    """What engines are made for, and tried with."""

    policy: Policy
    tails: TailConfig
    rows: int
    schedule: NoiseSchedule
    text: str

    def run(self, engines: Sequence[TailEngine]) -> None:
        """Every engine finishes one branch: it compiles and captures all it ever will."""
        conditioning = self.policy.encode([self.text])
        for engine in engines:
            latents = torch.zeros(1, *self.policy.latent_shape, device=self.policy.device)
            engine.finish(latents, [self.schedule.num_steps - 1], conditioning, self.schedule)
            engine.work.read()


def make_engines(policy: Policy, tails: TailConfig, rows: int, schedule: NoiseSchedule, text: str) -> Engines:
    """The engines of the level asked for, or of the first of AUTO that works; each has finished one branch by then,
    but for evaluation's, which does so at its first use.

    Args:
        schedule, text: what the trial uses.
    Raises:
        BadInput: the level asked for does not work here, with torch's own words; a setting needs compilation and what
            serves does not compile; or a capture broke, after which no other level may be tried.
    """
    return first_that_works(Trial(policy, tails, rows, schedule, text), levels_of(policy.device, tails), _make)


Made = TypeVar("Made")


def first_that_works(trial: Trial, levels: Sequence[str], make: Callable[[Trial, Sequence[str]], Made]) -> Made:
    """What `make` gives for the first of `levels` that does not fail; it gets the levels from that one on.

    Raises:
        BadInput: as `make_engines`.
    """
    asked = trial.tails.level
    for place, level in enumerate(levels):
        try:
            return make(trial, levels[place:])
        except CaptureBroken as error:
            hint = (f"CUDA broke off the capture of {level} ({_reason(error)}), after which this process cannot go on; "
                    f"start again with tails.level={LEVELS[level].uncaptured}")  # fmt: skip
            raise BadInput("tails.level", asked, hint) from error
        except RuntimeError as error:
            if level == "eager":
                raise
            if level == levels[-1]:
                hint = f"does not work here ({_reason(error)}); use tails.level=auto or eager"
                raise BadInput("tails.level", asked, hint) from error
            say(f"tails.level={level} does not work here ({_reason(error)})")
    raise AssertionError("the last level returns or raises")


def levels_of(device: torch.device, tails: TailConfig) -> tuple[str, ...]:
    """What is tried in turn.

    Raises:
        BadInput: CUDA graphs asked for without a GPU.
    """
    if "graph" in tails.level and device.type != "cuda":
        raise BadInput("tails.level", tails.level, "CUDA graphs need a GPU; use compile, eager or auto")
    return AUTO.get(device.type, ("eager",)) if tails.level == "auto" else (tails.level,)


def check_compiled(tails: TailConfig, level: str) -> None:
    """
    Raises:
        BadInput: a setting that needs compilation, where `level` serves and does not compile.
    """
    for name, reason in ONLY_COMPILED.items():
        if getattr(tails, name) and not LEVELS[level].compiled:
            hint = f"tails.level={tails.level} is {level} here, without compilation: {reason}; use tails.level=compile"
            raise BadInput(f"tails.{name}", True, f"{hint}, or tails.{name}=false")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _make(trial: Trial, levels: Sequence[str]) -> Engines:
    """The engines of the first of `levels`, of which those of an iteration have finished a branch."""
    policy, tails, level = trial.policy, trial.tails, LEVELS[levels[0]]
    check_compiled(tails, levels[0])
    recorder = level.recorder(policy.device) if level.recorder else None
    engine = _kind(trial, level, recorder, policy.merged if tails.merged else nullcontext)
    explore = tuple(engine(solver) for solver in tail_solvers(tails))
    trial.run(explore)

    def evaluation(trial: Trial, still: Sequence[str]) -> TailEngine:
        other = LEVELS[still[0]]
        own = recorder if other is level else other.recorder and other.recorder(policy.device)
        shared = engine if other is level and not tails.merged else _kind(trial, other, own, nullcontext)
        exact = shared(EXACT)
        trial.run([exact])
        return exact

    late = EngineAtFirstUse(trial.rows, lambda: first_that_works(trial, levels, evaluation))
    return Engines(levels[0], explore, late)


def _kind(
    trial: Trial, level: Level, recorder: Recorder | None, weights: Numerics
) -> Callable[[TailSolver], TailEngine]:
    """Makes engines that share their compiled blocks and their buffers."""
    policy, rows = trial.policy, trial.rows
    numerics = numerics_of(policy, weights, level.compiled, AUTOTUNED if trial.tails.autotune else None)
    if recorder is None:
        return lambda solver: EagerEngine(policy, rows, solver, numerics)
    store = BufferStore(policy, rows, recorder, numerics)
    return lambda solver: StaticEngine(store, solver)


def numerics_of(policy: Policy, weights: Numerics, compiled: bool, mode: str | None) -> Numerics:
    """The context of a tail's network call: its weights, and its blocks compiled or not."""
    if not compiled:
        return weights
    with weights():
        blocks = CompiledBlocks(policy.blocks(), mode)

    @contextmanager
    def both() -> Iterator[None]:
        with weights(), blocks():
            yield

    return both
