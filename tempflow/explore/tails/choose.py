"""How many branches travel together, and by which engine: measured before the first iteration."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch

from tempflow.common.errors import BadInput
from tempflow.common.say import say
from tempflow.explore.schedule import NoiseSchedule
from tempflow.explore.tails.chunks import ChunkChoice, choose_rows, free_memory, measure
from tempflow.explore.tails.levels import LEVELS, Engines, check_compiled, levels_of, make_engines
from tempflow.policy import Policy
from tempflow.settings.fields import TailConfig


def check_tail_settings(tails: TailConfig, network_rows: int, device: torch.device) -> None:
    """What of the settings cannot be had from this kind of model on this device, before its weights are loaded.

    Args:
        network_rows: that one velocity costs.
    Raises:
        BadInput: fp8 without a merged copy; a setting that needs compilation without it; guidance in part of the tails
            where the model has no unconditional rows to save; CUDA graphs without a GPU.
    """
    if tails.fp8 and not tails.merged:
        raise BadInput("tails.fp8", True, "only the merged copy can be in fp8; use tails.merged=true")
    if tails.guidance_above and network_rows == 1:
        hint = "this model's velocity costs one network row (its guidance is none or embedded); leave it at 0"
        raise BadInput("tails.guidance_above", tails.guidance_above, hint)
    check_compiled(tails, levels_of(device, tails)[0])


def prepare_weights(tails: TailConfig, policy: Policy) -> None:
    """The decoder's layout, and the merged copy in 8 bits, where settings ask for it.

    Raises:
        BadInput: as `check_tail_settings`, or fp8 on a device that has none.
    """
    check_tail_settings(tails, policy.network_rows, policy.device)
    policy.prepare_decoder(tails.compile_vae)
    if tails.fp8:
        say(f"tails: {policy.quantise_merged()}")


def measure_rows(
    tails: TailConfig, policy: Policy, lengths: Sequence[int], text: str, held_back: float, unguided: int = 0
) -> ChunkChoice:
    """The chunk size that is fastest here.

    Calls are tried with the weights that will serve, but never compiled: each size would compile anew, for minutes on
    a GPU. Uncompiled calls take more memory and more time, mostly where they are small, so that what is chosen fits
    and is rather too large than too small.

    Args:
        lengths: network evaluations of every branch of an iteration, in the order they travel.
        text: a prompt, for trials.
        held_back: bytes that the rest of the run will hold beside the tails or, where these are captured and keep
            their memory, at any time after them, but does not yet.
        unguided: how many of the evaluations of a tail, the last ones, take no guidance.
    """
    probes = measure(policy, policy.merged if tails.merged else nullcontext, len(lengths), text)
    padded = LEVELS[levels_of(policy.device, tails)[0]].recorder is not None
    choice = choose_rows(lengths, probes, free_memory(policy.device) - held_back, padded, unguided)
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
