"""The operators of the library in plain torch, for any device: `reference` and `gradients` behind the op signatures."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from . import philox, reference
from .gradients import branch_slopes, loss_then_gradient, transition_log_prob_gradient, velocity_gradient
from .reference import Branches

__all__ = [
    "branch_loss",
    "branch_loss_gradient",
    "log_ratio",
    "normal",
    "transition_log_prob",
    "transition_log_prob_gradient",
    "transition_step",
    "velocity_gradient",
]

normal = philox.normal
log_ratio = reference.log_ratio
transition_log_prob = reference.transition_log_prob


def transition_step(
    latents: Tensor,
    velocity: Tensor,
    coef: Tensor,
    key: Tensor,
    siblings: int,
    velocity_uncond: Tensor | None,
    guidance: float,
) -> tuple[Tensor, Tensor]:
    """next_latents (R, K, D...), contiguous whatever the strides of the inputs, and log_prob (R, K)."""
    following, log_prob = reference.transition_step(latents, velocity, coef, key, siblings, velocity_uncond, guidance)
    return following.contiguous(), log_prob


def branch_loss(
    branches: Branches, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """loss (), statistics (7,) in the order of BranchLossStats, slopes (R, K) for `velocity_gradient`."""
    loss, stats, log_ratios, gain = reference.loss_parts(branches, advantages, clip_low, clip_high)
    return loss, stats.table, branch_slopes(log_ratios, gain, clip_low, clip_high)


branch_loss_gradient = partial(loss_then_gradient, branch_loss, velocity_gradient)
