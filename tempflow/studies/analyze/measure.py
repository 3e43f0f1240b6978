"""Each step of a schedule by itself: what one stochastic step there does to the reward, what it costs, how it pulls.

From every trunk K siblings fork at every step but the last, take a stochastic step there alone, and follow the ODE to
an image: the paper's Fig. 2 (left), over its Fig. 5 (left: reward spread beside the noise; right: gradients before and
after weighting). No optimizer step is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tempflow.common.errors import BadInput
from tempflow.credit.advantage import MIN_SPREAD, Credit, give_credit, known_std
from tempflow.credit.scoring import collect_rewards
from tempflow.explore.rollout import Rollout, explore, finish_branches
from tempflow.explore.schedule import NoiseSchedule
from tempflow.explore.tails.solver import tail_solvers
from tempflow.forecast.cost import learning_passes
from tempflow.learn.batches import updates
from tempflow.learn.objective import WEIGHT
from tempflow.method import Method, read_method
from tempflow.run.trainer import Trainer
from tempflow.settings.fields import Config

SIBLINGS = 6
"""where the stack has one sibling a fork, as chains do"""


@dataclass(frozen=True)
class StepFigures:
    """One fork step."""

    step: int
    sigma: float
    noise: float
    """std of the stochastic step"""
    reward_std: float
    """standard deviation of the reward among siblings, mean over trunks"""
    zero_spread: float
    """part of the groups of siblings whose rewards do not differ"""
    gradient: float
    """norm of the mean gradient of the policy loss with weight 1"""
    weight: float
    """of the stack's objective.weighting"""
    rows: int
    """network rows of this fork per trunk: tails and learning"""

    @property
    def weighted_gradient(self) -> float:
        """The gradient is linear in the weight."""
        return self.gradient * self.weight


@dataclass(frozen=True)
class Spread:
    """Rewards of one noise level. S = T - 1 forks, R trunks, K siblings."""

    level: float | tuple[float, ...]
    """sample.noise_level: of all steps, or S, of each"""
    rewards: Tensor
    """(S, R, K) fp32; NaN where a scorer has no opinion"""

    def levels(self) -> Tensor:
        """(S,) float64"""
        return torch.tensor(self.level, dtype=torch.float64).expand(len(self.rewards))

    def stds(self) -> Tensor:
        """(S,): mean over trunks of the standard deviation among siblings."""
        return known_std(self.rewards, (2,))[1].squeeze(2).nanmean(1)

    def zero_spread(self, siblings: int | None = None) -> Tensor:
        """(S,): part of the groups, of their first `siblings`, whose rewards all lie within 1e-6."""
        group = self.rewards[..., :siblings]
        known = ~group.isnan()
        highest, lowest = (group.where(known, -torch.inf).amax(2), group.where(known, torch.inf).amin(2))
        return (highest - lowest <= MIN_SPREAD).double().mean(1)


def analysis_config(config: Config) -> Config:
    """The settings of a stack, but every step forks by itself and siblings are compared."""
    own = config.explore
    siblings = own.siblings if own.siblings > 1 else SIBLINGS
    explored = replace(own, forks="all", take=None, draw="iteration", window=1, jump=1, siblings=siblings)
    learn = replace(config.learn, updates=1, inner_epochs=1, updates_by="forks")
    credit = replace(config.credit, group="seed", std="unbiased" if config.credit.std == "unbiased" else "group")
    return replace(config, explore=explored, learn=learn, credit=credit, objective=replace(config.objective, kl=0.0))


@dataclass(frozen=True)
class Explored:
    """One iteration's branches and what they are worth."""

    rollout: Rollout
    credit: Credit
    rewards: Tensor
    """(S, R, K)"""


def explore_once(trainer: Trainer, method: Method, schedule: NoiseSchedule, iteration: int) -> Explored:
    """The branches of an iteration of prompts, scored; of several tails the first one's rewards are looked at."""
    config, policy = trainer.config, trainer.policy
    plan = method.plan(config.run.seed, iteration, config.explore.prompts).of(trainer.feed.slots)
    prompts, draw = trainer.feed.at(iteration)
    of_trunks = [prompt for prompt in prompts for _ in range(plan.noises)]
    with trainer.numerics():
        conditioning = policy.encode([prompt.text for prompt in prompts]).repeat(plan.noises)
        rollout = explore(policy, schedule, plan, draw, conditioning, config.learn.rows)
    policy.refresh_merged()
    for branches in finish_branches(trainer.tails, rollout, schedule):
        trainer.scores.submit(branches, of_trunks)
    shape = (len(trainer.tails), *rollout.branches.shape[:3])
    rewards = collect_rewards(trainer.scores, trainer.rewards, trainer.ranks, shape)
    credit = give_credit(rewards, trainer.rewards.weights, method.comparison)
    return Explored(rollout, credit, trainer.rewards.total(rewards[0]))


def scaled(level: float | Sequence[float], factor: float) -> float | list[float]:
    """A noise level of all steps, or of each, times a factor."""
    return [factor * each for each in level] if isinstance(level, Sequence) else factor * level


def level_words(level: float | Sequence[float]) -> str:
    """Example: "0.7", or "[0.5, 0.7, 0.9]"."""
    return str([round(each, 4) for each in level]) if isinstance(level, Sequence) else f"{level:g}"


def measure_spread(trainer: Trainer, factor: float, iterations: int) -> Spread:
    """Rewards at the stack's noise level times `factor`, on the prompts, noises and random numbers of all others."""
    sample = replace(trainer.config.sample, noise_level=scaled(trainer.config.sample.noise_level, factor))
    method, schedule = read_method(replace(trainer.config, sample=sample), trainer.schedule.sigmas)
    parts = [explore_once(trainer, method, schedule, iteration).rewards for iteration in range(iterations)]
    return Spread(_plain(sample.noise_level), torch.cat(parts, 1))


def _plain(level: float | list[float]) -> float | tuple[float, ...]:
    return tuple(level) if isinstance(level, list) else level


def measure_steps(trainer: Trainer, backward: Callable[[Trainer, Any], Any], iterations: int) -> tuple[
        list[StepFigures], Spread]:  # fmt: skip
    """The figures of every step, and the rewards that they come from.

    Args:
        trainer: with the settings of `analysis_config`. backward: the trainer's own, which adds a batch's gradient.
    Raises:
        BadInput: the reward tells no siblings apart, at any step.
    """
    method, schedule, gradients, rewards = trainer.method, trainer.schedule, [], []
    for iteration in range(iterations):
        found = explore_once(trainer, method, schedule, iteration)
        rewards.append(found.rewards)
        gradients.append(_gradients(trainer, found, backward))
    spread = Spread(_plain(trainer.config.sample.noise_level), torch.cat(rewards, 1))
    if (spread.zero_spread() == 1).all():
        hint = "gives all siblings of every fork the same score: there is no spread to analyze or to learn from"
        raise BadInput("reward.name", trainer.config.reward.name, hint)
    return _figures(trainer, spread, torch.stack(gradients).mean(0)), spread


def _gradients(trainer: Trainer, found: Explored, backward: Callable[[Trainer, Any], Any]) -> Tensor:
    """(S,) norms of the mean gradient of each fork, with weight 1; no parameter moves."""
    objective = trainer.method.objective
    terms = objective.terms.clone()
    terms[trainer.method.rule.trained(), WEIGHT] = 1.0
    parameters, scale = trainer.stepper.parameters.values(), trainer.stepper.scale
    own = trainer.ranks.share(found.credit.advantages.shape[1])
    norms = []
    for update in updates(found.rollout, found.credit, replace(objective, terms=terms), trainer.config.learn, own):
        for batch in update.batches:
            with trainer.numerics():
                backward(trainer, batch)
        squares = [parameter.grad.double().square().sum() for parameter in parameters if parameter.grad is not None]
        norms.append(torch.stack(squares).sum().sqrt().cpu() if squares else torch.zeros((), dtype=torch.float64))
        for parameter in parameters:
            parameter.grad = None
    return torch.stack(norms) / (1.0 if scale is None else scale.scale.double().cpu())


def _figures(trainer: Trainer, spread: Spread, gradients: Tensor) -> list[StepFigures]:
    schedule, terms = trainer.schedule, trainer.method.objective.terms
    stds, zero = spread.stds().tolist(), spread.zero_spread().tolist()
    costs = fork_rows(trainer.config, schedule, trainer.config.explore.siblings)
    return [
        StepFigures(step, schedule.sigmas[step].item(), schedule.sde.std[step].item(), stds[step], zero[step],
                    gradients[step].item(), terms[step, WEIGHT].item(), costs[step])
        for step in range(len(stds))
    ]  # fmt: skip


def fork_rows(config: Config, schedule: NoiseSchedule, siblings: int) -> list[int]:
    """Network rows per trunk of a fork at each step but the last: its siblings' tails, and learning's one row."""
    lengths = [solver.table(schedule).lengths for solver in tail_solvers(config.tails)]
    passes = learning_passes(config)
    return [sum(length[step + 1] for length in lengths) * siblings + passes for step in range(schedule.num_steps - 1)]


def correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Pearson's; NaN where one side does not vary."""
    pairs = torch.tensor([first, second], dtype=torch.float64)
    centred = pairs - pairs.mean(1, keepdim=True)
    return (centred.prod(0).sum() / centred.square().sum(1).prod().sqrt()).item()
