"""The fast path of ODE tails. No gradient and no log-probability depends on its precision, only the reward does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from tempflow_kernels import transition_step
from torch import Tensor

from tempflow.explore.schedule import NoiseSchedule
from tempflow.explore.tails.solver import EXACT, GUIDED, KEEP_V, KEEP_X, MEMORY, SIGMA, TailSolver
from tempflow.policy import Conditioning, Policy

Numerics = Callable[[], AbstractContextManager[None]]
"""Makes the context in which a tail calls the network: merged weights, compiled blocks, or nothing."""


@dataclass
class TailWork:
    """Velocities of tails since the last `read`; one without its unconditional half counts 1/2."""

    computed: float = 0
    needed: float = 0

    def add(self, rows: int, under_way: int, guided: int) -> None:
        """A call for `rows` branches, of which so many have set out, and so many of these take guidance."""
        self.computed += rows if guided else rows / 2
        self.needed += (under_way + guided) / 2

    def read(self) -> float:
        """The part of the computed rows that nobody needed (branches that had not set out, padding); starts again."""
        waste = 1 - self.needed / self.computed if self.computed else 0.0
        self.computed = self.needed = 0
        return waste


def read_waste(tails: Sequence[TailEngine]) -> float:
    """The part of the rows computed by all tails since the last call that nobody needed, rounded."""
    total = TailWork(sum(tail.work.computed for tail in tails), sum(tail.work.needed for tail in tails))
    for tail in tails:
        tail.work.read()
    return round(total.read(), 4)


class TailEngine(Protocol):
    """Carries branches along the ODE to the end."""

    rows: int
    """branches that travel together at most"""
    work: TailWork

    def finish(
        self, latents: Tensor, first_steps: Sequence[int], conditioning: Conditioning, schedule: NoiseSchedule
    ) -> None:
        """All remaining ODE steps of B branches, in place.

        Args:
            latents: (B, D...) fp32, B at most `rows`; overwritten with the finished latents.
            first_steps: the step at which each branch sets out, ascending.
            conditioning: B rows.
        """
        ...

    def halve(self, tried: int) -> bool:
        """After memory ran out with `tried` rows: half as many from now on; False where that was done before or would
        not help."""
        ...


def tail_step(latents: Tensor, velocity: Tensor, now: Tensor, no_noise: Tensor, memory: Tensor | None) -> None:
    """One step of R branches, in place, without a host decision: a CUDA graph may hold it.

    Args:
        latents, velocity: (R, D...) fp32.
        now: (R, 8) fp32, a row of `TailTable.stages`.
        no_noise: (R, 2) int64 zeros.
        memory: (R, D...) fp32, what a multistep solver keeps from the step before; None where it keeps nothing.
    """
    following = transition_step(latents, velocity, now[:, :3].contiguous(), no_noise)[0][:, 0]
    if memory is not None:
        past, keep_x, keep_v = (
            now[:, column].view(-1, *[1] * (latents.dim() - 1)) for column in (MEMORY, KEEP_X, KEEP_V)
        )
        following = following + past * memory
        memory.copy_(keep_x * latents + keep_v * velocity)
    latents.copy_(following)


@dataclass
class EagerEngine:
    """Plain network calls; branches that have not set out yet cost nothing, and where no branch takes guidance, a
    velocity costs one network row."""

    policy: Policy
    rows: int
    solver: TailSolver = EXACT
    numerics: Numerics = nullcontext
    work: TailWork = field(default_factory=TailWork)
    halved: bool = False

    def halve(self, tried: int) -> bool:
        if self.halved or tried == 1:
            return False
        self.rows, self.halved = tried // 2, True
        return True

    @torch.no_grad()
    def finish(
        self, latents: Tensor, first_steps: Sequence[int], conditioning: Conditioning, schedule: NoiseSchedule
    ) -> None:
        table = self.solver.table(schedule)
        memory = torch.zeros_like(latents) if table.remembers else None
        no_noise = torch.zeros(len(latents), 2, dtype=torch.int64, device=latents.device)
        stages = table.stages(first_steps, latents.device)
        for now, count, guided in zip(stages, table.under_way(first_steps), table.guided(first_steps), strict=True):
            alive = slice(count)
            some = now[alive, GUIDED] > 0 if 0 < guided < count else guided > 0
            sigma = now[alive, SIGMA].contiguous()
            with self.numerics():
                velocity = self.policy.velocity(latents[alive], sigma, conditioning.rows(alive), some)
            tail_step(latents[alive], velocity, now[alive], no_noise[alive], None if memory is None else memory[alive])
            self.work.add(count, count, guided)
