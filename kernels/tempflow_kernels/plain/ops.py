"""The operators of the library in plain torch, for any device: `reference` and `gradients` behind the op signatures."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import philox, reference
from .gradients import branch_slopes, loss_then_gradient, transition_log_prob_gradient, velocity_gradient

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


def log_ratio(
    velocity: Tensor, velocity_old: Tensor, coef: Tensor, key: Tensor | None, noise: Tensor | None, siblings: int
) -> Tensor:
    """(R, K) log-ratios."""
    return reference.log_ratio(velocity, velocity_old, coef, key, siblings, noise)


def branch_loss(
    velocity: Tensor,
    velocity_old: Tensor,
    advantages: Tensor,
    weights: Tensor,
    coef: Tensor,
    key: Tensor | None,
    noise: Tensor | None,
    velocity_ref: Tensor | None,
    velocity_uncond: Tensor | None,
    kl_weights: Tensor | None,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    guidance: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss (), statistics (7,) in the order of BranchLossStats, slopes (R, K) for `velocity_gradient`."""
    mixed = reference.guided(velocity, velocity_uncond, guidance, torch.float32)
    log_ratios = reference.log_ratio(mixed, velocity_old, coef, key, advantages.shape[1], noise)
    gain = weights.float().unsqueeze(1) * advantages.float()
    kl = reference.reference_kl(mixed, velocity_ref, coef, kl_weights)
    loss = reference.clipped_objective(log_ratios, gain, clip_low, clip_high) + kl_coef * kl
    stats = torch.stack(reference.branch_stats(log_ratios, kl, clip_low, clip_high))
    return loss, stats, branch_slopes(log_ratios, gain, clip_low, clip_high)


branch_loss_gradient = partial(loss_then_gradient, branch_loss, velocity_gradient)
