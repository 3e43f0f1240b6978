"""Which forks, siblings and noise level measurements speak for, by three rules, and the network rows that they save.

1. Noise: of the levels tried, the one of largest reward spread whose branches lose on average at most half (LOSS) of
   that spread against the lowest level tried. More noise tells more apart until it spoils images.
2. Forks: the steps of largest reward variance among siblings, until together they hold 90 % (VARIANCE) of the
   sum over steps.
3. Siblings: the fewest, of at least FEWEST, with which at most 5 % (SLACK) more groups would show no spread than with
   all that were measured.
4. Even noise, a file of its own: for each step the level at which its reward spread would be the mean spread over steps
   at the level of rule 1, between the levels tried (as DenseGRPO, arXiv 2601.20218, calibrates noise per step).
5. Even gradients, another file: weights of the loss in inverse proportion to each step's gradient at weight 1, with
   mean 1, none larger than RANGE times the smallest.

What this promises is fewer network rows a trunk for the variance that is kept, to be spent on more prompts. It does not
promise a better model: that is what a study is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tempflow.common.yaml_values import to_yaml
from tempflow.explore.schedule import NoiseSchedule
from tempflow.settings.fields import Config
from tempflow.settings.reading import plain
from tempflow.studies.analyze.measure import Spread, fork_rows, level_words

VARIANCE, LOSS, SLACK, FEWEST, RANGE = 0.9, 0.5, 0.05, 4, 100.0
"""Rules of thumb, derived from nothing."""


@dataclass(frozen=True)
class Advice:
    """Example: forks (0, 1, 2), 4 siblings, level .7, 60 of 110 rows a trunk, 93 % of the variance."""

    forks: tuple[int, ...]
    siblings: int
    noise_level: float | tuple[float, ...]
    rows: int
    """a trunk"""
    rows_before: int
    """a trunk, with forks at every step and the siblings that were measured"""
    kept: float
    """part of the summed reward variance that the forks hold"""
    even_levels: tuple[float, ...]
    """one for each step but the last"""

    @property
    def saving(self) -> float:
        """Part of the network rows that is saved."""
        return 1 - self.rows / self.rows_before

    def describe(self) -> str:
        level = level_words(self.noise_level)
        return (
            f"recommended: forks at {list(self.forks)} ({100 * self.kept:.0f} % of the reward variance of all steps), "
            f"{self.siblings} siblings, noise level {level}: {self.rows} network rows a trunk instead of "
            f"{self.rows_before} ({100 * self.saving:.0f} % saved, {self.rows_before / self.rows:.2f} times the "
            f"prompts for the same rows). A saving in rows, not a promise of a better model: compare in a study"
        )

    def to_yaml(self) -> str:
        """A file that can be laid on the stack that was analyzed."""
        explore = {"forks": list(self.forks), "take": None, "draw": "iteration", "window": 1, "jump": 1,
                   "siblings": self.siblings}  # fmt: skip
        values = {"sample": {"noise_level": plain(self.noise_level)}, "explore": explore}
        return f"# {self.describe()}.\n" + to_yaml(values)

    def even_yaml(self) -> str:
        """The same, with the noise of rule 4 and nothing else."""
        values = {"sample": {"noise_level": plain(self.even_levels)}}
        return "# Noise at which siblings' rewards spread alike at every step.\n" + to_yaml(values)


def advise(config: Config, schedule: NoiseSchedule, spreads: Sequence[Spread]) -> Advice:
    """The advice of the rules at the head of this file.

    Args:
        config: with the siblings that were measured.
        spreads: of one level or several, ascending, on the same random numbers.
    """
    chosen = choose_level(spreads)
    forks, kept = choose_forks(chosen)
    siblings = choose_siblings(chosen, forks)
    before = trunk_rows(config, schedule, range(schedule.num_steps - 1), config.explore.siblings)
    rows = trunk_rows(config, schedule, forks, siblings)
    return Advice(forks, siblings, chosen.level, rows, before, kept, choose_even_levels(spreads, chosen))


def choose_level(spreads: Sequence[Spread]) -> Spread:
    """Rule 1."""
    lowest = min(spreads, key=lambda spread: spread.level)
    best = lowest.rewards.nanmean().item()
    fit = [spread for spread in spreads
           if best - spread.rewards.nanmean().item() <= LOSS * spread.stds().mean().item()]  # fmt: skip
    return max(fit, key=lambda spread: spread.stds().mean().item())


def choose_forks(spread: Spread) -> tuple[tuple[int, ...], float]:
    """Rule 2: the steps, ascending, and the part of the variance that they hold."""
    variances = spread.stds().double().square().nan_to_num()
    shares = (variances / variances.sum()).tolist()
    taken, held = [], 0.0
    for step in sorted(range(len(shares)), key=lambda step: -shares[step]):
        if held >= VARIANCE:
            break
        taken.append(step)
        held += shares[step]
    return tuple(sorted(taken)), held


def choose_siblings(spread: Spread, forks: Sequence[int]) -> int:
    """Rule 3."""
    measured = spread.rewards.shape[2]
    allowed = spread.zero_spread()[list(forks)].mean().item() + SLACK
    fit = (count for count in range(min(FEWEST, measured), measured + 1)
           if spread.zero_spread(count)[list(forks)].mean().item() <= allowed)  # fmt: skip
    return next(fit)


def choose_even_levels(spreads: Sequence[Spread], chosen: Spread) -> tuple[float, ...]:
    """Rule 4, by straight lines between the levels tried; a spread that falls as noise grows counts as level."""
    levels = torch.stack([spread.levels() for spread in spreads], 1)
    stds = torch.stack([spread.stds().double() for spread in spreads], 1).nan_to_num().cummax(1).values
    target = chosen.stds().nanmean().item()
    return tuple(round(float(np.interp(target, *pair)), 4) for pair in zip(stds.tolist(), levels.tolist(), strict=True))


def even_weights(gradients: Sequence[float]) -> list[float]:
    """Rule 5, from each step's norm; a list for objective.weighting."""
    inverse = 1 / torch.tensor(gradients, dtype=torch.float64).clamp(min=max(gradients) / RANGE)
    return [round(weight, 4) for weight in (inverse / inverse.mean()).tolist()]


def trunk_rows(config: Config, schedule: NoiseSchedule, forks: Sequence[int], siblings: int) -> int:
    """Network rows of a trunk and all its forks."""
    costs = fork_rows(config, schedule, siblings)
    return max(forks) + 1 + sum(costs[step] for step in forks)
