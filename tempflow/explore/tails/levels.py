"""Which engine carries the tails: levels from plain calls to captured graphs, and proof that the chosen one works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from tempflow.common.errors import BadInput
from tempflow.common.say import say
from tempflow.explore.schedule import NoiseSchedule
from tempflow.explore.tails.compiled import CompiledBlocks
from tempflow.explore.tails.engine import EagerEngine, Numerics, TailEngine
from tempflow.explore.tails.recorded import BufferStore, CudaGraphs, Direct, Recorder, StaticEngine
from tempflow.explore.tails.solver import EXACT, tail_solvers
from tempflow.policy import Policy
from tempflow.settings.fields import TailConfig


@dataclass(frozen=True)
class Level:
    """How a network call of a tail is made."""

    compiled: bool
    """the repeated blocks are torch.compile's"""
    recorder: Callable[[torch.device], Recorder] | None
    """what repeats a call on fixed buffers; None makes calls of the branches that are under way only"""


LEVELS = {
    "eager": Level(False, None),
    "graph": Level(False, CudaGraphs),
    "compile": Level(True, lambda device: Direct()),
    "compiled_graph": Level(True, CudaGraphs),
}
AUTO = {"cuda": ("compiled_graph", "compile", "graph", "eager")}
"""What tails.level=auto tries in turn, per device; eager elsewhere."""


@dataclass(frozen=True)
class Engines:
    """One for the branches of an iteration, one for evaluation."""

    level: str
    explore: tuple[TailEngine, ...]
    """V, one for each way from a branch to an image"""
    evaluate: TailEngine
    """exact: Euler on every sigma, in the numerics of training"""


def make_engines(
    policy: Policy, tails: TailConfig, rows: int, schedule: NoiseSchedule, text: str
) -> Engines:
    """The engines of the level asked for, or of the first of AUTO that works; each has finished one branch by then.

    Args:
        schedule, text: what the trial uses.
    Raises:
        BadInput: the level asked for does not work here, with torch's own words.
    """
    levels = levels_of(policy, tails)
    if "graph" in tails.level and policy.device.type != "cuda":
        raise BadInput("tails.level", tails.level, "CUDA graphs need a GPU; use compile, eager or auto")
    for level in levels[:-1]:
        try:
            return _tried(policy, tails, rows, level, schedule, text)
        except RuntimeError as error:
            say(f"tails.level={level} does not work here ({_reason(error)})")
    if levels[-1] == "eager":
        return _tried(policy, tails, rows, "eager", schedule, text)
    try:
        return _tried(policy, tails, rows, levels[-1], schedule, text)
    except RuntimeError as error:
        hint = f"does not work here ({_reason(error)}); use tails.level=auto or eager"
        raise BadInput("tails.level", tails.level, hint) from error


def levels_of(policy: Policy, tails: TailConfig) -> tuple[str, ...]:
    """What is tried in turn."""
    return AUTO.get(policy.device.type, ("eager",)) if tails.level == "auto" else (tails.level,)


def _reason(error: RuntimeError) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _tried(
    policy: Policy, tails: TailConfig, rows: int, level: str, schedule: NoiseSchedule, text: str
) -> Engines:
    engines = _build(policy, tails, rows, level)
    conditioning = policy.encode([text])
    for engine in (engines.evaluate, *engines.explore):
        latents = torch.zeros(1, *policy.latent_shape, device=policy.device)
        engine.finish(latents, [schedule.num_steps - 1], conditioning, schedule)
        engine.work.read()
    return engines


def _build(policy: Policy, tails: TailConfig, rows: int, name: str) -> Engines:
    level, solvers = LEVELS[name], tail_solvers(tails)
    merged = policy.merged if tails.merged else nullcontext
    fast = _numerics(policy, merged, level.compiled)
    plain = _numerics(policy, nullcontext, level.compiled) if tails.merged else fast
    if level.recorder is None:
        explore = tuple(EagerEngine(policy, rows, solver, fast) for solver in solvers)
        return Engines(name, explore, EagerEngine(policy, rows, EXACT, plain))
    recorder = level.recorder(policy.device)
    store = BufferStore(policy, rows, recorder, fast)
    exact = BufferStore(policy, rows, recorder, plain) if tails.merged else store
    return Engines(name, tuple(StaticEngine(store, solver) for solver in solvers), StaticEngine(exact, EXACT))


def _numerics(policy: Policy, weights: Numerics, compiled: bool) -> Numerics:
    """The context of a tail's network call: its weights, and its blocks compiled or not."""
    if not compiled:
        return weights
    with weights():
        blocks = CompiledBlocks(policy.blocks())

    @contextmanager
    def both() -> Iterator[None]:
        with weights(), blocks():
            yield

    return both
