"""Credit: advantages normalised within groups of branches (TempFlow-GRPO, "seed group").

Deviation: the released code gets seed groups only because its statistics are per rank at batch size 1; here a group is
a set of axes of the reward tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

GROUP_AXES = {"seed": (3,), "prompt": (2, 3), "batch": (1, 2, 3)}
"""Axes of (S steps, P prompts, N seeds, K siblings) that a group spans. Steps are never mixed."""

STD_EPSILON = 1e-4
"""Added to the standard deviation, as in the released code."""

MIN_SPREAD = 1e-6
"""A group whose rewards all lie within this tells nothing about its siblings; it would only amplify rounding."""


@dataclass(frozen=True)
class Credit:
    """What each branch's reward says about its one stochastic step."""

    advantages: Tensor
    """(S, R, K) fp32; 0 in a masked group"""
    informative: Tensor
    """(S, R) bool; False where the group's rewards do not differ"""
    groups: int
    """how many groups there are"""
    masked: int
    """how many of them are not informative"""


def group_advantages(rewards: Tensor, seeds: int, group: str, std: str = "group", clip: float = 5.0) -> Credit:
    """(reward - group mean) / (std + 1e-4), clipped.

    Args:
        rewards: (S, R, K) with R = P prompts x N seeds, prompt by prompt, of all ranks.
        seeds: N.
        group: "seed" (siblings share prompt, noise and step), "prompt" or "batch".
        std: "group" for the group's own standard deviation, "global" for that of all rewards of the iteration.
        clip: advantages are limited to +-clip.
    """
    steps, rows, siblings = rewards.shape
    grouped = rewards.view(steps, rows // seeds, seeds, siblings)
    axes = GROUP_AXES[group]
    centred = grouped - grouped.mean(axes, keepdim=True)
    scale = grouped.std(axes, keepdim=True, correction=0) if std == "group" else grouped.std(correction=0)
    spread = grouped.amax(axes, keepdim=True) - grouped.amin(axes, keepdim=True)
    differs = spread > MIN_SPREAD
    informative = differs.expand(steps, rows // seeds, seeds, 1)
    advantages = (centred / (scale + STD_EPSILON)).clamp(-clip, clip) * informative
    masked = int((~differs).sum())
    return Credit(advantages.reshape(steps, rows, siblings), informative.reshape(steps, rows), differs.numel(), masked)
