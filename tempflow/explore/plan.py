"""Where trajectories fork, and what that costs.

Deviation from the released code: the cost of an iteration is computed and printed before anything is sampled.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tempflow.common.draws import FORKS, shuffled
from tempflow.common.errors import BadInput

FORMS = "all, a list such as [0,2,4], first:n or random:n"


@dataclass(frozen=True)
class BranchPlan:
    """Fork steps and siblings of one iteration.

    Example: T = 10, `steps` (0 .. 8), K = 6: each trunk gives 54 images, and a branch born at step k has 9 - k more
    network evaluations to go.
    """

    num_steps: int
    """T, network evaluations of one full trajectory"""
    siblings: int
    """K, branches that leave one fork"""
    pool: tuple[int, ...]
    """steps at which a run may fork, ascending; noise weights have mean 1 over these"""
    steps: tuple[int, ...]
    """steps at which this iteration forks, ascending, S of them"""

    @staticmethod
    def parse(spec: str | Sequence[int], num_steps: int, siblings: int) -> BranchPlan:
        """A plan from `explore.forks`: all, a list of steps, first:n, or random:n (a fresh subset every iteration).

        Raises:
            BadInput: another form, or a fork step outside 0 .. T-2 (the last step has no tail to tell siblings apart).
        """
        every = tuple(range(num_steps - 1))
        if isinstance(spec, str):
            pool, count = _named_steps(spec, every)
        else:
            pool = tuple(sorted(set(spec)))
            count = len(pool)
        outside = [step for step in pool if step not in every]
        if outside or not pool:
            mend = f"fork steps lie in 0 .. {num_steps - 2} when sample.steps={num_steps}"
            raise BadInput("explore.forks", spec, mend)
        return BranchPlan(num_steps, siblings, pool, pool[:count])

    def drawn(self, run_seed: int, iteration: int) -> BranchPlan:
        """The plan of one iteration: as many forks as `steps` has, drawn from `pool` without replacement."""
        if len(self.steps) == len(self.pool):
            return self
        order = shuffled(len(self.pool), run_seed, FORKS, iteration)[: len(self.steps)]
        return replace(self, steps=tuple(sorted(self.pool[index] for index in order)))


def _named_steps(spec: str, every: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """The pool of a named form and the number of forks drawn from it."""
    if spec == "all":
        return every, len(every)
    match = re.fullmatch(r"(first|random):(\d+)", spec)
    if not match:
        raise BadInput("explore.forks", spec, f"give {FORMS}")
    count = int(match[2])
    if not 1 <= count <= len(every):
        raise BadInput("explore.forks", spec, f"n must lie in 1 .. {len(every)}")
    pool = every[:count] if match[1] == "first" else every
    return pool, count


