"""How many branches travel together, and by which engine: measured before the first iteration."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

from tempflow.common.errors import BadInput
from tempflow.common.say import say
from tempflow.explore.schedule import NoiseSchedule
from tempflow.explore.tails.chunks import ChunkChoice, choose_rows, free_memory, measure
from tempflow.explore.tails.levels import LEVELS, Engines, levels_of, make_engines
from tempflow.policy import Policy
from tempflow.settings.fields import TailConfig


def prepare_weights(tails: TailConfig, policy: Policy) -> None:
    """The decoder's layout, and the merged copy in 8 bits, where settings ask for it.

    Raises:
        BadInput: fp8 without a merged copy, or on a device that has none.
    """
    if tails.fp8 and not tails.merged:
        raise BadInput("tails.fp8", True, "only the merged copy can be in fp8; use tails.merged=true")
    policy.prepare_decoder(tails.compile_vae)
    if tails.fp8:
        say(f"tails: {policy.quantise_merged()}")


def measure_rows(tails: TailConfig, policy: Policy, lengths: Sequence[int], text: str, held_back: int) -> ChunkChoice:
    """The chunk size that is fastest here.

    Args:
        lengths: network evaluations of every branch of an iteration, in the order they travel.
        text: a prompt, for trials.
        held_back: bytes that learning will hold, but does not yet.
    """
    probes = measure(policy, policy.merged if tails.merged else nullcontext, len(lengths), text)
    padded = LEVELS[levels_of(policy, tails)[0]].recorder is not None
    choice = choose_rows(lengths, probes, free_memory(policy.device) - held_back, padded)
    say(choice.describe())
    return choice


def choose_engines(tails: TailConfig, policy: Policy, schedule: NoiseSchedule, rows: int, text: str) -> Engines:
    """Engines that have taken a branch to its end each already, `rows` branches a call.

    Raises:
        BadInput: a level that does not work here.
    """
    engines = make_engines(policy, tails, rows, schedule, text)
    if engines.level != "eager":
        say(f"tails: {engines.level}, {rows} rows a call")
    return engines
