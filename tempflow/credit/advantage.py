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

Axes = tuple[int, ...]

GROUP_AXES = {"seed": (3,), "prompt": (2, 3), "batch": (1, 2, 3)}
"""Axes of (S steps, P prompts, N seeds, K siblings) that a group spans. Steps are never mixed."""

STD_EPSILON = 1e-4
"""Added to the standard deviation, as in the released code."""

MIN_SPREAD = 1e-6
"""A group whose rewards all lie within this tells nothing about its siblings; it would only amplify rounding."""


MIXES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "sum": lambda weights: (weights[None], torch.ones(1)),
    "advantages": lambda weights: (torch.eye(len(weights)), weights),
}
"""Several rewards with weights (M,) -> what is normalised, as J linear combinations of them (J, M), and the weights
(J,) of the advantages that come out. "sum" normalises one weighted sum; "advantages" normalises each reward by itself,
so that a reward of small spread is not drowned (GDPO, arXiv 2601.05242, but for its last one over the batch)."""


@dataclass(frozen=True)
class Credit:
    """What each branch's reward says about its one stochastic step."""

    advantages: Tensor
    """(S, R, K) fp32; 0 in a masked group, and for a branch without a reward"""
    informative: Tensor
    """(S, R) bool; False where the group's rewards do not differ, or fewer than two are known"""
    groups: int
    """how many groups there are"""
    masked: int
    """how many of them are not informative"""


def combined_advantages(
    rewards: Tensor, weights: Tensor, combine: str, seeds: int, group: str, std: str = "group", clip: float = 5.0
) -> Credit:
    """Advantages of M rewards, mixed before or after normalisation.

    Args:
        rewards: (M, S, R, K) with R = P prompts x N seeds, prompt by prompt, of all ranks; NaN where a scorer has no
            opinion: such a branch gets no credit from this reward (from the sum of all, if that is normalised), and
            the mean and standard deviation of its group are those of its other siblings.
        weights: (M,).
        combine: "sum" or "advantages".
        seeds: N.
        group: "seed" (siblings share prompt, noise and step), "prompt" or "batch".
        std: "group" for the group's own standard deviation, "global" for that of all rewards of the iteration.
        clip: the advantages that come out are limited to +-clip.
    """
    before, after = MIXES[combine](weights)
    parts = [_normalise(mixture, seeds, group, std) for mixture in _mix(before, rewards)]
    advantages = sum(weight * part for weight, (part, _) in zip(after, parts, strict=True)).clamp(-clip, clip)
    differs = torch.stack([differs for _, differs in parts]).any(0)
    steps, rows = advantages.shape[:2]
    informative = differs.expand(steps, rows // seeds, seeds, 1).reshape(steps, rows)
    return Credit(advantages, informative, differs.numel(), int((~differs).sum()))


def group_advantages(rewards: Tensor, seeds: int, group: str, std: str = "group", clip: float = 5.0) -> Credit:
    """`combined_advantages` of one reward (S, R, K)."""
    return combined_advantages(rewards[None], torch.ones(1), "sum", seeds, group, std, clip)


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


def _normalise(rewards: Tensor, seeds: int, group: str, std: str) -> tuple[Tensor, Tensor]:
    """(reward - mean) / (std + 1e-4), 0 where masked, (S, R, K); and which groups differ, (S, P or 1, N or 1, 1)."""
    steps, rows, siblings = rewards.shape
    grouped = rewards.view(steps, rows // seeds, seeds, siblings)
    axes, known = GROUP_AXES[group], ~grouped.isnan()
    mean, scale = known_std(grouped, axes)
    if std == "global":
        scale = known_std(grouped, (0, 1, 2, 3))[1]
    highest = grouped.where(known, -torch.inf).amax(axes, keepdim=True)
    differs = highest - grouped.where(known, torch.inf).amin(axes, keepdim=True) > MIN_SPREAD
    advantages = ((grouped - mean) / (scale + STD_EPSILON)).where(known & differs, 0)
    return advantages.reshape(steps, rows, siblings), differs


def known_mean(values: Tensor, digits: int | None = None) -> float | None:
    """Mean of the values that are not NaN, rounded if `digits` are given; None if there are none."""
    mean = values.nanmean().item()
    return None if math.isnan(mean) else mean if digits is None else round(mean, digits)
