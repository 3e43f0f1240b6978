"""Credit: advantages normalised within groups of branches (TempFlow-GRPO, "seed group").

Deviation: the released code gets seed groups only because its statistics are per rank at batch size 1; here a group is
a set of axes of the reward tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tempflow.common.errors import BadInput

Axes = tuple[int, ...]

GROUP_AXES = {"seed": (3,), "prompt": (2, 3), "batch": (1, 2, 3)}
"""Axes of (S forks, P prompts, N noises, K siblings) that a group spans. Forks are never mixed."""


@dataclass(frozen=True)
class Deviation:
    """What an advantage is divided by."""

    axes: Axes | None
    """axes that the standard deviation spans; None for those of the group"""
    correction: int
    """0: biased; 1: unbiased"""
    epsilon: float
    """added to it"""


DEVIATIONS = {
    "group": Deviation(None, 0, 1e-4),
    "global": Deviation((1, 2, 3), 0, 1e-4),
    "unbiased": Deviation(None, 1, 1e-8),
}
"""By the values of credit.std: TempFlow-GRPO's; Flow-GRPO's, one per step over all trajectories; that of DanceGRPO,
MixGRPO and G2RPO."""

MIN_SPREAD = 1e-6
"""A group whose rewards all lie within this tells nothing about its siblings; it would only amplify rounding."""


MIXES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "sum": lambda weights: (weights[None], torch.ones(1)),
    "advantages": lambda weights: (torch.eye(len(weights)), weights),
}
"""Several rewards with weights (M,) -> what is normalised, as J linear combinations of them (J, M), and the weights
(J,) of the advantages that come out. "sum" normalises one weighted sum; "advantages" normalises each reward by itself,
so that a reward of small spread is not drowned (GDPO, arXiv 2601.05242, but for its last one over the batch). Several
tails of a branch are normalised each by itself, and their advantages summed (G2RPO, arXiv 2510.01982)."""


@dataclass(frozen=True)
class Comparison:
    """Who is compared with whom. Example: Comparison(4, "seed") compares the K siblings of each fork."""

    noises: int
    """N"""
    group: str
    """a name of GROUP_AXES: "seed" groups share prompt, noise and fork"""
    std: str = "group"
    """a name of DEVIATIONS"""
    clip: float = 5.0
    """the advantages that come out are limited to +- this"""
    combine: str = "sum"
    """a name of MIXES"""


@dataclass(frozen=True)
class Credit:
    """What each branch's reward says about its decisions. Example: R = 8 trunks, S = 9, K = 6: (9, 8, 6) and (9, 8)."""

    advantages: Tensor
    """(S, R, K) fp32; 0 in a masked group, and for a branch without a reward"""
    informative: Tensor
    """(S, R) bool; False where the group's rewards do not differ, or fewer than two are known"""
    groups: int
    """how many groups there are"""
    masked: int
    """how many of them are not informative"""


def give_credit(rewards: Tensor, weights: Tensor, comparison: Comparison) -> Credit:
    """Advantages of M rewards of V tails per branch, mixed before or after normalisation.

    Args:
        rewards: (V, M, S, R, K), R = P prompts x N noises, prompt by prompt, of all processes; NaN where a scorer has
            no opinion: such a branch gets no credit from this reward (from the sum of all, if that is normalised), and
            the mean and standard deviation of its group are those of its other members.
        weights: (M,).
    Raises:
        BadInput: no branch has all the rewards whose sum is normalised.
    """
    before, after = MIXES[comparison.combine](weights)
    mixtures = [_mix(before, tail) for tail in rewards]
    if all(mixture.isnan().all() for mixture in mixtures):
        hint = "no image has all of these rewards, so there is no sum of them; use reward.combine=advantages"
        raise BadInput("reward.combine", comparison.combine, hint)
    parts = [_normalise(mixture, comparison) for mixed in mixtures for mixture in mixed]
    factors = after.repeat(len(rewards))
    summed = sum(factor * part for factor, (part, _) in zip(factors, parts, strict=True))
    differs = torch.stack([differs for _, differs in parts]).any(0)
    steps, rows, noises = *summed.shape[:2], comparison.noises
    informative = differs.expand(steps, rows // noises, noises, 1).reshape(steps, rows)
    advantages = summed.clamp(-comparison.clip, comparison.clip)
    return Credit(advantages, informative, differs.numel(), int((~differs).sum()))


def known_std(rewards: Tensor, axes: Axes) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over `axes`, which stay as 1, of the rewards that are not NaN; 0 without any."""
    known = ~rewards.isnan()
    share = known.float().mean(axes, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    mean = rewards.where(known, 0).mean(axes, keepdim=True) / share
    return mean, rewards.where(known, mean).std(axes, keepdim=True, correction=0) / share.sqrt()


def _mix(before: Tensor, rewards: Tensor) -> Tensor:
    """(J, M) and (M, S, R, K) -> (J, S, R, K); a missing reward counts only where it has a weight."""
    factors = before[:, :, None, None, None]
    return (factors * rewards).where(factors != 0, 0).sum(1)


def _normalise(rewards: Tensor, comparison: Comparison) -> tuple[Tensor, Tensor]:
    """(reward - mean) / (std + epsilon), 0 where masked, (S, R, K); and which groups differ, (S, P or 1, N or 1, 1)."""
    steps, rows, siblings = rewards.shape
    grouped = rewards.view(steps, rows // comparison.noises, comparison.noises, siblings)
    axes, known, deviation = GROUP_AXES[comparison.group], ~grouped.isnan(), DEVIATIONS[comparison.std]
    mean = known_std(grouped, axes)[0]
    spanned = deviation.axes or axes
    scale = known_std(grouped, spanned)[1] * _corrected(known, spanned, deviation.correction)
    highest = grouped.where(known, -torch.inf).amax(axes, keepdim=True)
    differs = highest - grouped.where(known, torch.inf).amin(axes, keepdim=True) > MIN_SPREAD
    advantages = ((grouped - mean) / (scale + deviation.epsilon)).where(known & differs, 0)
    return advantages.reshape(steps, rows, siblings), differs


def _corrected(known: Tensor, axes: Axes, correction: int) -> Tensor:
    """Biased to unbiased standard deviation: sqrt(n / (n - correction)) of the n known rewards along `axes`."""
    count = known.sum(axes, keepdim=True)
    return (count / (count - correction).clamp(min=1)).sqrt() if correction else torch.ones(())


def known_mean(values: Tensor, digits: int | None = None) -> float | None:
    """Mean of the values that are not NaN, rounded if `digits` are given; None if there are none."""
    mean = values.nanmean().item()
    return None if math.isnan(mean) else mean if digits is None else round(mean, digits)
