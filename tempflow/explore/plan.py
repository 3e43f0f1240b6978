"""Where trajectories fork: a rule from settings, and the plan it gives one iteration.

A trunk is always the ODE. A fork is a run of `window` stochastic steps that K siblings take from one trunk state, then
follow the ODE to an image. All published methods are such plans: TempFlow-GRPO forks at every step with a window of 1
(arXiv 2508.04324), Flow-GRPO at step 0 with a window of T - 1 and K = 1, each trunk a noise of its own (2505.05470).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tempflow.common.draws import FORKS, shuffled
from tempflow.common.errors import BadInput
from tempflow.settings.fields import ExploreConfig

FORMS = "all, a list such as [0,2,4], first:n, first:50% or random:n"


@dataclass(frozen=True)
class Plan:
    """The decisions of one iteration: P prompts x N noises = R trunks, S forks each, K siblings a fork.

    Example: T = 10, forks at 0 .. 8, P = 2, N = 4, K = 6: `steps` is (9, 2), and 8 trunks give 432 branches.
    """

    steps: Tensor
    """(S, P) int64 on the host: where fork s of prompt p leaves the trunk, ascending in s"""
    window: int
    """stochastic steps in a row that a sibling takes before its tail"""
    noises: int
    """N, trunks per prompt"""
    siblings: int
    """K, branches that leave one fork"""

    @property
    def forks(self) -> int:
        """S"""
        return len(self.steps)

    def trunk_steps(self) -> Tensor:
        """(S, R) int64: where fork s of each trunk leaves it."""
        return self.steps.repeat_interleave(self.noises, 1)

    def of(self, prompts: range) -> Plan:
        """The part of some prompts in a row, those of one process."""
        return replace(self, steps=self.steps[:, prompts.start : prompts.stop])


@dataclass(frozen=True)
class Forks:
    """The rule that chooses forks. Example: Forks((0, 1, 2, 3), 1, "prompt") takes one of four for each prompt."""

    pool: tuple[int, ...]
    """steps that may be chosen, ascending"""
    take: int
    """how many of them"""
    draw: str = "iteration"
    every: int = 1
    """iterations between two moves of sliding forks"""

    def at(self, run_seed: int, iteration: int, prompts: int) -> Tensor:
        """(S, P) int64: the forks of one iteration, of `prompts` prompts over all processes."""
        choose = DRAWS[self.draw]
        columns = [[self.pool[place] for place in choose(self, run_seed, iteration, prompts, prompt)]
                   for prompt in range(prompts)]  # fmt: skip
        return torch.tensor(columns, dtype=torch.int64).T

    def drawn(self, run_seed: int, turn: int) -> list[int]:
        """Places in the pool, drawn without replacement as a function of (run seed, turn); all of them need no draw."""
        if self.take == len(self.pool):
            return list(range(self.take))
        return sorted(shuffled(len(self.pool), run_seed, FORKS, turn)[: self.take])


DRAWS: dict[str, Callable[[Forks, int, int, int, int], list[int]]] = {
    "iteration": lambda forks, seed, iteration, prompts, prompt: forks.drawn(seed, iteration),
    "prompt": lambda forks, seed, iteration, prompts, prompt: forks.drawn(seed, iteration * prompts + prompt),
    "slide": lambda forks, seed, iteration, prompts, prompt: [(iteration // forks.every) % len(forks.pool)],
}
"""Places in the pool for (rule, run seed, iteration, number of prompts, prompt)."""


@dataclass(frozen=True)
class ForkRule:
    """What `explore.*` says for a schedule of T steps."""

    forks: Forks
    window: int
    jumps: tuple[int, ...]
    """T: sigmas that a stochastic step at each step of the schedule spans; 1 but for merged steps"""

    def after(self, step: int) -> int:
        """The step at which a window that begins at `step` is over and tails begin."""
        for _ in range(self.window):
            step += self.jumps[step] if step < len(self.jumps) else 1
        return step

    def trained(self) -> list[int]:
        """Every step that a window of a run may hold, ascending: those whose decisions are learnt from."""
        found = set()
        for step in self.forks.pool:
            for _ in range(self.window):
                found.add(step)
                step += self.jumps[step]
        return sorted(found)


def read_forks(explore: ExploreConfig, num_steps: int) -> ForkRule:
    """The rule of forks for a schedule of `num_steps` steps.

    Raises:
        BadInput: a form of explore.forks that does not exist, a fork outside the schedule, a window or a jump that
            passes the last step (which has to be left for a tail), or more forks to draw than there are.
    """
    if isinstance(explore.forks, str):
        pool, take = _named(explore, num_steps)
    else:
        pool = _listed(explore.forks, num_steps)
        take = len(pool)
    window = num_steps - 1 - pool[0] if explore.window == "rest" else explore.window
    rule = ForkRule(Forks(pool, take), window, _jumps(explore, pool, num_steps))
    if not isinstance(explore.forks, str) or re.fullmatch(r"first:\d+", explore.forks):
        _check_end(rule, explore, num_steps)  # steps that were asked for by number
    rule = _fitting(rule, explore, num_steps)
    _check_end(rule, explore, num_steps)
    return replace(rule, forks=_drawing(rule.forks, explore), jumps=_within(rule.jumps))


def _listed(steps: Sequence[int], num_steps: int) -> tuple[int, ...]:
    pool = tuple(sorted(set(steps)))
    if not pool or not all(0 <= step <= num_steps - 2 for step in pool):
        hint = f"fork steps lie in 0 .. {num_steps - 2} when sample.steps={num_steps}"
        raise BadInput("explore.forks", list(steps), hint)
    return pool


def _named(explore: ExploreConfig, num_steps: int) -> tuple[tuple[int, ...], int]:
    """The pool of a named form, and how many of it are drawn."""
    every, spec = tuple(range(num_steps - 1)), explore.forks
    match = re.fullmatch(r"(first|random):(\d{1,6})(%?)", spec)
    if spec != "all" and (not match or (match[1] == "random" and match[3])):
        raise BadInput("explore.forks", spec, f"give {FORMS}")
    if spec == "all":
        return every, len(every)
    share = min(max(1, math.floor(num_steps * int(match[2]) / 100)), len(every))
    count = share if match[3] else int(match[2])
    if not 1 <= count <= len(every):
        raise BadInput("explore.forks", spec, f"n must lie in 1 .. {len(every)} when sample.steps={num_steps}")
    return (every[:count], count) if match[1] == "first" else (every, count)


def _jumps(explore: ExploreConfig, pool: tuple[int, ...], num_steps: int) -> tuple[int, ...]:
    """Per step of the schedule: the jump of the forks, 1 elsewhere."""
    listed = [explore.jump] * len(pool) if isinstance(explore.jump, int) else explore.jump
    if isinstance(explore.jump, list) and isinstance(explore.forks, list) and list(pool) != explore.forks:
        raise BadInput("explore.forks", explore.forks, "give ascending steps, each once, where explore.jump is a list")
    if len(listed) != len(pool):
        hint = f"give one number, or one for each of the {len(pool)} steps of explore.forks"
        raise BadInput("explore.jump", explore.jump, hint)
    jump_of = dict(zip(pool, listed, strict=True))
    return tuple(jump_of.get(step, 1) for step in range(num_steps))


def _within(jumps: Sequence[int]) -> tuple[int, ...]:
    """Jumps that pass the last step, of steps that a named pool cannot hold, are 1: no window comes there."""
    return tuple(jump if step + jump < len(jumps) else 1 for step, jump in enumerate(jumps))


def _fitting(rule: ForkRule, explore: ExploreConfig, num_steps: int) -> ForkRule:
    """The steps of the pool from which the window leaves a tail, or all of it where none does; `random:n` stays n."""
    pool = tuple(step for step in rule.forks.pool if rule.after(step) <= num_steps - 1)
    take = rule.forks.take if str(explore.forks).startswith("random") else len(pool)
    return replace(rule, forks=Forks(pool, take)) if pool else rule


def _check_end(rule: ForkRule, explore: ExploreConfig, num_steps: int) -> None:
    for step in rule.forks.pool:
        if rule.after(step) > num_steps - 1:
            field = "explore.window" if rule.window > 1 or explore.jump == 1 else "explore.jump"
            hint = (f"from the fork at step {step} it passes the last step that leaves a tail, {num_steps - 2} when "
                    f"sample.steps={num_steps}; make it shorter or fork earlier")  # fmt: skip
            raise BadInput(field, explore.window if field == "explore.window" else explore.jump, hint)


def _drawing(forks: Forks, explore: ExploreConfig) -> Forks:
    """The same pool with the number of forks and the way of drawing that settings ask for."""
    sliding = explore.draw == "slide"
    if sliding and explore.take not in (None, 1):
        raise BadInput("explore.take", explore.take, "sliding forks come one at a time; give 1 or another explore.draw")
    take = 1 if sliding else explore.take or forks.take
    if not take <= len(forks.pool):
        field, value = ("explore.take", explore.take) if explore.take else ("explore.forks", explore.forks)
        raise BadInput(field, value, f"only {len(forks.pool)} steps may fork: {list(forks.pool)}")
    return Forks(forks.pool, take, explore.draw, explore.every)
