"""The engines of a run from its settings: chunk size, merged copy, level."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext

from tempflow.common.errors import BadInput
from tempflow.explore.plan import BranchPlan
from tempflow.explore.schedule import NoiseSchedule
from tempflow.explore.tails.chunks import choose_rows, free_memory, measure, tail_lengths
from tempflow.explore.tails.levels import LEVELS, Engines, levels_of, make_engines
from tempflow.explore.tails.solver import TailSolver
from tempflow.policy import Policy
from tempflow.settings.fields import Config


def set_up_tails(
    config: Config,
    policy: Policy,
    schedule: NoiseSchedule,
    plan: BranchPlan,
    trunks: int,
    text: str,
    known_rows: int | None,
    agree: Callable[[int], int],
    speak: bool,
    learning: int,
) -> Engines:
    """Engines that have carried a branch each already.

    Args:
        trunks: R of this process. text: a prompt, for trials.
        known_rows: what an earlier part of this run chose where tails.rows=auto, so that rounding stays the same.
        agree: one chunk size for all processes out of each one's own.
        learning: bytes that learning will hold, but does not yet.
    Raises:
        BadInput: a level or fp8 that does not work here.
    """
    tails = config.tails
    if tails.fp8 and not tails.merged:
        raise BadInput("tails.fp8", True, "only the merged copy can be in fp8; use tails.merged=true")
    say = (lambda words: print(f"tempflow: {words}", file=sys.stderr)) if speak else (lambda words: None)
    policy.prepare_decoder(tails.compile_vae)
    if tails.fp8:
        say(f"tails: {policy.quantise_merged()}")
    rows = config.tails.rows
    if rows == "auto" and known_rows:
        rows = known_rows
    elif rows == "auto":
        solver = TailSolver(tails.solver, tails.stride, tails.drop_below)
        lengths = tail_lengths(plan, trunks, solver, schedule)
        probes = measure(policy, policy.merged if tails.merged else nullcontext, len(lengths), text)
        padded = LEVELS[levels_of(policy, tails)[0]].recorder is not None
        free = free_memory(policy.device) - learning
        choice = choose_rows(lengths, probes, free, padded)
        say(choice.describe())
        rows = agree(choice.rows)
    engines = make_engines(policy, tails, rows, schedule, text, speak)
    if engines.level != "eager":
        say(f"tails: {engines.level}, {rows} rows a call")
    return engines
