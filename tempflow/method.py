"""A method: where trajectories fork, who is compared with whom, and what the loss multiplies. Nothing else.

    method            forks                      window  group, std        weight        ratio      optimizer step takes
    TempFlow-GRPO     all                        1       seed, group       std / mean    Gaussian   trunks
    Flow-GRPO         0, K = 1, own noises       T - 1   prompt, global    1             Gaussian   trunks
    MixGRPO           one, slides                4       seed, unbiased    1             Gaussian   trunks
    G2RPO             the first half, two tails  1       seed, unbiased    1             Gaussian   forks
    GRPO-Guard        on top of any                                        1/dt / mean   guard

Each is a file of `settings/presets/methods/`, and none of them is known to the code: explore, credit and learn take the
numbers below.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tempflow.credit.advantage import Comparison
from tempflow.explore.plan import ForkRule, Plan, read_forks
from tempflow.explore.schedule import NoiseSchedule, build_schedule
from tempflow.learn.objective import Objective, make_objective
from tempflow.settings.fields import Config


@dataclass(frozen=True)
class Method:
    """Example: TempFlow-GRPO at T = 10: forks at 0 .. 8, window 1, 4 noises x 6 siblings, seed groups, 10 x 4 terms."""

    rule: ForkRule
    noises: int
    siblings: int
    comparison: Comparison
    objective: Objective

    def branches(self, prompts: int) -> int:
        """Branches of an iteration of so many prompts."""
        return prompts * self.noises * self.rule.forks.take * self.siblings

    def plan(self, run_seed: int, iteration: int, prompts: int) -> Plan:
        """The decisions of one iteration, of the prompts of all processes."""
        steps = self.rule.forks.at(run_seed, iteration, prompts)
        return Plan(steps, self.rule.window, self.noises, self.siblings)


def read_method(config: Config, sigmas: Tensor) -> tuple[Method, NoiseSchedule]:
    """The method that settings describe, on a schedule of (T+1,) sigmas.

    Raises:
        BadInput: settings that cannot work together on this schedule.
    """
    explore, sample, credit = config.explore, config.sample, config.credit
    rule = read_forks(explore, len(sigmas) - 1)
    schedule = build_schedule(sigmas, sample.transition, sample.noise_level, rule.jumps)
    objective = make_objective(config.objective, schedule, rule.trained(), credit.idle)
    comparison = Comparison(explore.noises, credit.group, credit.std, credit.clip, config.reward.combine)
    return Method(rule, explore.noises, explore.siblings, comparison, objective), schedule
