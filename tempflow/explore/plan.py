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
        """A plan from `branch.steps`: all, a list of steps, first:n, or random:n (a fresh subset every iteration).

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
            raise BadInput("branch.steps", spec, mend)
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
        raise BadInput("branch.steps", spec, f"give {FORMS}")
    count = int(match[2])
    if not 1 <= count <= len(every):
        raise BadInput("branch.steps", spec, f"n must lie in 1 .. {len(every)}")
    pool = every[:count] if match[1] == "first" else every
    return pool, count


@dataclass(frozen=True)
class BranchCost:
    """Network rows, decodes and memory of one iteration; a random plan is costed at its dearest draw."""

    rows: int
    """R, trunks"""
    trunk_rows: int
    tail_rows: int
    learn_rows: int
    """training rows, each of which carries K siblings: once per inner epoch, twice where KL needs the reference"""
    images: int
    latent_bytes: int
    """trunk states and velocities, living branches, decoded images, on the rank that holds `rows` trunks"""

    @staticmethod
    def of(plan: BranchPlan, rows: int, latent_elements: int, image_bytes: int, passes: int = 1) -> BranchCost:
        """The cost of `plan` over `rows` trunks with latents of `latent_elements` fp32 numbers.

        `passes` are the network calls per fork in learning: inner epochs, times 2 with a KL term.
        """
        last = plan.num_steps - 1
        dearest = plan.pool[: len(plan.steps)]
        forks, images = len(plan.steps), rows * len(plan.steps) * plan.siblings
        latents = 4 * latent_elements * (2 * rows * forks + images)
        return BranchCost(
            rows=rows,
            trunk_rows=rows * (plan.pool[-1] + 1),
            tail_rows=rows * plan.siblings * sum(last - step for step in dearest),
            learn_rows=rows * forks * passes,
            images=images,
            latent_bytes=latents + images * image_bytes,
        )

    def describe(self, plan: BranchPlan, halves: int) -> str:
        """The cost in words; `halves` is 2 where guidance needs a second network row for each."""
        guided = " (each twice, for guidance)" if halves == 2 else ""
        total = halves * (self.trunk_rows + self.tail_rows + self.learn_rows)
        return (
            f"{self.rows} trunks x {len(plan.steps)} forks x {plan.siblings} siblings = {self.images} images to decode "
            f"and score an iteration; network rows{guided}: trunk {self.trunk_rows}, tails {self.tail_rows}, "
            f"learning {self.learn_rows}, {total} in all; {self.latent_bytes / 2**20:.1f} MiB of latents and images"
        )
