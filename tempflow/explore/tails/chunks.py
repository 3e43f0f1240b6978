"""How many branches should travel together: measured, not guessed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from tempflow.common.tensors import chunks
from tempflow.explore.plan import ForkRule
from tempflow.explore.schedule import NoiseSchedule
from tempflow.explore.tails.engine import Numerics
from tempflow.explore.tails.solver import TailSolver
from tempflow.policy import Conditioning, Policy

FIRST_PROBE, GROWTH = 4, 4
"""Sizes that are tried: 4, 16, 64, ..."""
CALLS = 3
"""Calls of each size; the first may allocate or choose kernels."""
BUDGET = {"cpu": 1.5, "cuda": 20.0}
"""Seconds; a probe that would take longer than what is left is not made."""
MEMORY_SHARE = 0.8
"""Part of the free memory that a chunk may take; the rest is for decoding and scoring beside it."""
BEYOND = 2
"""How far beyond the largest size tried one may go."""
NEAR_ENOUGH = 1.05
"""Of all sizes this near to the fastest, the smallest is taken: less memory, earlier to the scorer."""


@dataclass(frozen=True)
class Probe:
    """One network call."""

    rows: int
    seconds: float
    peak: int
    """bytes of device memory beyond those held before it; 0 on a CPU"""


@dataclass(frozen=True)
class ChunkChoice:
    rows: int
    waste: float
    """part of the computed rows that nobody needs"""
    probes: tuple[Probe, ...]

    def describe(self) -> str:
        timed = ", ".join(f"{probe.rows}: {1000 * probe.seconds / probe.rows:.2f}" for probe in self.probes)
        return (
            f"tails.rows: {self.rows} branches travel together, {100 * self.waste:.1f} % of their network rows for "
            f"nothing (ms a row in calls of {timed})"
        )


def choose_rows(
    lengths: Sequence[int], probes: Sequence[Probe], free: float, padded: bool, unguided: int = 0
) -> ChunkChoice:
    """The chunk size with which an iteration's tails take least time.

    Args:
        lengths: network evaluations of each branch of one iteration, in the order they travel.
        probes: of growing size.
        free: bytes a call may take beyond what is held already.
        padded: every call has the full chunk's rows (static engines); else only those under way (eager).
        unguided: how many evaluations at the end of a tail take no guidance, at the price of half as many rows.
    """
    most = min(len(lengths), BEYOND * probes[-1].rows, _fitting(probes, free))
    sizes = sorted({size for count in range(1, len(lengths) + 1) if (size := -(-len(lengths) // count)) <= most})
    calls = {size: _calls(lengths, size, padded, unguided) for size in sizes}
    seconds = {size: sum(_call_seconds(probes, rows) for rows in calls[size]) for size in sizes}
    rows = next(size for size in sizes if seconds[size] <= NEAR_ENOUGH * min(seconds.values()))
    needed = sum(length - min(length, unguided) / 2 for length in lengths)
    return ChunkChoice(rows, 1 - needed / sum(calls[rows]), tuple(probes))


def _fitting(probes: Sequence[Probe], free: float) -> float:
    """The rows whose call fits into `free` bytes, by a straight line through the smallest and the largest probe."""
    small, large = probes[0], probes[-1]
    if large.peak <= small.peak:
        return float("inf")
    return max(1, small.rows + (free - small.peak) * (large.rows - small.rows) / (large.peak - small.peak))


def _calls(lengths: Sequence[int], size: int, padded: bool, unguided: int) -> list[float]:
    """Rows of each network call of all chunks of `size`; one without its unconditional half counts half of them."""
    calls: list[float] = []
    for part in chunks(len(lengths), size):
        for left in range(lengths[part.start], 0, -1):
            rows = size if padded else sum(length >= left for length in lengths[part])
            calls.append(rows / 2 if left <= unguided else rows)
    return calls


def _call_seconds(probes: Sequence[Probe], rows: float) -> float:
    """Straight lines between what was measured; below that the smallest call, beyond in proportion to the largest."""
    for left, right in pairwise(probes):
        if left.rows <= rows <= right.rows:
            share = (rows - left.rows) / (right.rows - left.rows)
            return left.seconds + share * (right.seconds - left.seconds)
    return max(probes[0].seconds, probes[-1].seconds * rows / probes[-1].rows)


def tail_lengths(rule: ForkRule, branches: int, solver: TailSolver, schedule: NoiseSchedule) -> list[int]:
    """Network evaluations of every branch of an iteration whose forks lie as early as they may, in order.

    Args:
        branches: that leave one fork step, of all trunks.
    """
    lengths, earliest = solver.table(schedule).lengths, rule.forks.pool[: rule.forks.take]
    return [lengths[rule.after(step)] for step in earliest for _ in range(branches)]


@torch.no_grad()
def measure(policy: Policy, numerics: Numerics, most: int, text: str) -> list[Probe]:
    """Probes of growing size up to `most` rows, as many as time and memory allow."""
    conditioning, size, probes = policy.encode([text]), min(FIRST_PROBE, most), []
    _call(policy, numerics, conditioning.repeat(size))  # whatever happens only once, happens here
    deadline = time.perf_counter() + BUDGET.get(policy.device.type, BUDGET["cpu"])
    while True:
        try:
            probes.append(_probe(policy, numerics, conditioning.repeat(size)))
        except torch.OutOfMemoryError:
            if not probes:
                raise
            torch.cuda.empty_cache()
            return probes
        following = min(size * GROWTH, most)
        late = time.perf_counter() + CALLS * probes[-1].seconds * following / size > deadline
        if following == size or late or _fitting(probes, free_memory(policy.device)) < following:
            return probes
        size = following


def _call(policy: Policy, numerics: Numerics, conditioning: Conditioning) -> None:
    """One network call of a tail."""
    rows = len(conditioning)
    latents = torch.zeros(rows, *policy.latent_shape, device=policy.device)
    with numerics():
        policy.velocity(latents, torch.full((rows,), 0.5, device=policy.device), conditioning)


def _probe(policy: Policy, numerics: Numerics, conditioning: Conditioning) -> Probe:
    """The shortest of a few calls, and the memory they took at most."""
    device, held, times = policy.device, 0, []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
    for _ in range(CALLS):
        _wait(device)
        start = time.perf_counter()
        _call(policy, numerics, conditioning)
        _wait(device)
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) - held if device.type == "cuda" else 0
    return Probe(len(conditioning), min(times), peak)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> float:
    """Bytes that a chunk may take: of the GPU's free memory and what the allocator keeps unused; no limit on a CPU."""
    if device.type != "cuda":
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return MEMORY_SHARE * (free + kept)
