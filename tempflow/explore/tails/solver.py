"""How tails follow the ODE, as tables of numbers: which sigmas they visit and how each step is formed.

A step is `next = x_coef x + v_coef v + memory_coef m`, after which the memory becomes `m = keep_x x + keep_v v`.
Solver, stride, dropped steps and steps without guidance are nothing but values in these tables, built once in float64
on the host.

Notation: s = sigma, s' the sigma stepped to, h = log((1 - s') / s') - log((1 - s) / s), step size D = s - s'.
Sources: DPM-Solver++(2M), arXiv 2211.01095, with alpha = 1 - sigma; Adams-Bashforth of order 2 for uneven steps;
guidance in an interval of sigmas only, arXiv 2404.07724.
Deviation: a tail's first step is Euler's, since the trunk's velocity at the fork belongs to a state before the noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from tempflow.common.tensors import to_device
from tempflow.explore.schedule import NoiseSchedule
from tempflow.settings.fields import TailConfig

COLUMNS = ("x_coef", "v_coef", "std", "sigma", "memory_coef", "keep_x", "keep_v", "guided")
"""x_coef, v_coef, std first: what `transition_step` takes; std is 0. guided is 1 or 0."""
SIGMA, MEMORY, KEEP_X, KEEP_V, GUIDED = range(3, 8)
IDLE = (1.0, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0)
"""The step of a branch that has not set out yet: it stays where it is."""

Step = tuple[float, float, float, float, float]


def euler(before: float | None, sigma: float, following: float) -> Step:
    """(x_coef, v_coef, memory_coef, keep_x, keep_v) of one step; `before` is the sigma of the tail's previous step."""
    return 1.0, following - sigma, 0.0, 0.0, 0.0


def dpmpp_2m(before: float | None, sigma: float, following: float) -> Step:
    """Extrapolates the predicted image x - s v linearly in log((1 - s) / s); Euler where that is infinite."""
    ratio, weight = following / sigma, 0.0
    if before is not None and before < 1 and following > 0:
        weight = (_log_snr(following) - _log_snr(sigma)) / (_log_snr(sigma) - _log_snr(before)) / 2
    image = (1 - ratio) * (1 + weight)
    return ratio + image, -sigma * image, -(1 - ratio) * weight, 1.0, -sigma


def adams_2(before: float | None, sigma: float, following: float) -> Step:
    """Extrapolates the velocity linearly in sigma; finite on the way to 0 too."""
    size = sigma - following
    weight = 0.0 if before is None else size / (before - sigma) / 2
    return 1.0, -size * (1 + weight), size * weight, 0.0, 1.0


def _log_snr(sigma: float) -> float:
    return math.log((1 - sigma) / sigma)


SOLVERS: dict[str, Callable[[float | None, float, float], Step]] = {
    "euler": euler,
    "dpmpp_2m": dpmpp_2m,
    "adams_2": adams_2,
}


@dataclass(frozen=True)
class TailTable:
    """The steps of every possible tail over one schedule. Tails end together: stage -1 is the last step of all."""

    steps: Tensor
    """(T first steps, stages, 8) float64 in the order of COLUMNS; IDLE before a tail sets out"""
    lengths: tuple[int, ...]
    """T: network evaluations of the tail that sets out at each step; never longer for a later step"""
    unguided: tuple[int, ...]
    """T: how many of these, the last ones, take no guidance"""
    remembers: bool
    """a step uses the one before it"""

    @property
    def switches(self) -> bool:
        """Whether some step takes no guidance."""
        return any(self.unguided)

    def stages(self, first_steps: Sequence[int], device: torch.device) -> Tensor:
        """(stages, B, 8) fp32: the steps of B branches, from the first that one of them takes."""
        longest = self.lengths[first_steps[0]]
        rows = self.steps[list(first_steps), self.steps.shape[1] - longest :]
        return to_device(rows.transpose(0, 1).float().contiguous(), device)

    def under_way(self, first_steps: Sequence[int]) -> list[int]:
        """How many of B branches (first steps ascending) have set out, at each of those stages."""
        lengths = [self.lengths[step] for step in first_steps]
        return [sum(length >= left for length in lengths) for left in range(lengths[0], 0, -1)]

    def guided(self, first_steps: Sequence[int]) -> list[int]:
        """How many of these take guidance, at each of those stages."""
        tails = [(self.lengths[step], self.unguided[step]) for step in first_steps]
        return [sum(length >= left > unguided for length, unguided in tails) for left in range(tails[0][0], 0, -1)]


@dataclass(frozen=True)
class TailSolver:
    """The choice of steps. The default is exact: Euler on every sigma of the schedule, as trunks travel."""

    solver: str = "euler"
    stride: int = 1
    """sigmas of the schedule per step"""
    drop_below: float = 0.0
    """a tail ends with a step from its last sigma that is not below this; its first step is always taken"""
    guidance_above: float = 0.0
    """steps from a sigma below this take the velocity of the conditional network rows alone"""

    def visited(self, schedule: NoiseSchedule, first_step: int) -> list[float]:
        """The sigmas of a tail, with the 0 it ends at."""
        own = range(first_step, schedule.num_steps, self.stride)
        sigmas = schedule.sigmas.tolist()
        return [sigmas[step] for step in own if step == first_step or sigmas[step] >= self.drop_below] + [0.0]

    @lru_cache(maxsize=16)  # noqa: B019 - frozen and few, all alive to the end of the run
    def table(self, schedule: NoiseSchedule) -> TailTable:
        """All tails over `schedule`."""
        tails = [self._tail(schedule, first) for first in range(schedule.num_steps)]
        stages = len(tails[0])
        padded = [[IDLE] * (stages - len(tail)) + tail for tail in tails]
        steps = torch.tensor(padded, dtype=torch.float64)
        unguided = tuple(sum(not row[GUIDED] for row in tail) for tail in tails)
        return TailTable(steps, tuple(map(len, tails)), unguided, bool(steps[..., MEMORY].any()))

    def _tail(self, schedule: NoiseSchedule, first_step: int) -> list[tuple[float, ...]]:
        """The rows of one tail."""
        rows, before = [], None
        for sigma, following in pairwise(self.visited(schedule, first_step)):
            x_coef, v_coef, *memory = SOLVERS[self.solver](before, sigma, following)
            rows.append((x_coef, v_coef, 0.0, sigma, *memory, float(sigma >= self.guidance_above)))
            before = sigma
        return rows

    def describe(self) -> str:
        """In words."""
        steps = "every sigma" if self.stride == 1 else f"every {self.stride}th sigma"
        dropped = f", steps below sigma {self.drop_below:g} dropped" if self.drop_below else ""
        unguided = f", no guidance below sigma {self.guidance_above:g}" if self.guidance_above else ""
        return f"{self.solver} on {steps}{dropped}{unguided}"


EXACT = TailSolver()


def tail_solvers(tails: TailConfig) -> tuple[TailSolver, ...]:
    """V solvers: one for each stride of `tails.stride`."""
    strides = [tails.stride] if isinstance(tails.stride, int) else tails.stride
    return tuple(TailSolver(tails.solver, stride, tails.drop_below, tails.guidance_above) for stride in strides)
