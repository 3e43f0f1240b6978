"""Analytic gradients of the operators, in plain torch: what the fused gradient kernels compute.

`slopes` are derivatives of a scalar with respect to the (R, K) log-probabilities or log-ratios. Everything a velocity
gradient needs besides tensors of the size of the velocity is in them, so one formula serves every backend and every
loss that is a function of log-ratios.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .reference import compute_dtype, guided, normal_like, per_row


def sensitivity(coef: Tensor) -> Tensor:
    """`v_coef / std` per row (R,), 0 for the rows without noise."""
    _, v_coef, std = coef.unbind(1)
    stochastic = std > 0
    return torch.where(stochastic, v_coef / torch.where(stochastic, std, 1.0), 0.0)


def transition_log_prob_gradient(
    slopes: Tensor, next_latents: Tensor, latents: Tensor, velocity: Tensor, coef: Tensor
) -> Tensor:
    """`sum_j slope_j v_coef (next_j - mean) / (std^2 d)`, in the shape and dtype of `velocity`."""
    dtype = compute_dtype(next_latents, latents, velocity, coef)
    x_coef, v_coef, std = coef.to(dtype).unbind(1)
    mean = per_row(x_coef, latents) * latents.to(dtype) + per_row(v_coef, latents) * velocity.to(dtype)
    residual = (next_latents.to(dtype) - mean.unsqueeze(1)).flatten(2)
    scale = sensitivity(coef.to(dtype)) / torch.where(std > 0, std, 1.0) / residual.shape[2]
    gradient = torch.einsum("rk,rkd->rd", slopes.to(dtype) * scale.unsqueeze(1), residual)
    return gradient.view(velocity.shape).to(velocity.dtype)


def branch_slopes(log_ratios: Tensor, gain: Tensor, low: float, high: float) -> Tensor:
    """Derivative of the clipped objective with respect to the log-ratios: `-gain * ratio / (R K)`, 0 where clipped."""
    excess = torch.expm1(log_ratios)
    active = -gain * excess >= -gain * excess.clamp(-low, high)
    return torch.where(active, -gain * (1 + excess), 0.0) / log_ratios.numel()


def velocity_gradient(
    slopes: Tensor,
    scale: Tensor,
    velocity: Tensor,
    velocity_old: Tensor,
    coef: Tensor,
    key: Tensor | None,
    noise: Tensor | None,
    velocity_ref: Tensor | None,
    velocity_uncond: Tensor | None,
    kl_weights: Tensor | None,
    kl_coef: float,
    guidance: float,
) -> tuple[Tensor, Tensor]:
    """Gradient of `scale * loss` for the two guidance halves.

    With `s = v_coef / std`, `delta = v_old - v` and slopes g_j:
    `(s^2 (sum_j g_j) delta + s sum_j g_j noise_j) / d + kl_coef kl_w s^2 (v - v_ref) / (d R)`, times guidance for
    `velocity` and times `1 - guidance` for `velocity_uncond`.

    Returns:
        gradients in the dtypes of `velocity` and `velocity_uncond`; the second is empty without that input.
    """
    dtype = compute_dtype(velocity, velocity_old, coef, noise)
    rows, siblings = slopes.shape
    if noise is None:
        noise = normal_like(velocity, key, siblings)
    mixed = guided(velocity, velocity_uncond, guidance, dtype).flatten(1)
    slopes, ratio = slopes.to(dtype), sensitivity(coef.to(dtype)).unsqueeze(1)
    delta = velocity_old.to(dtype).flatten(1) - mixed
    gradient = ratio.square() * slopes.sum(1, keepdim=True) * delta
    gradient = gradient + ratio * torch.einsum("rk,rkd->rd", slopes, noise.to(dtype).flatten(2))
    if velocity_ref is not None:
        share = kl_coef / rows * ratio.square() * (1.0 if kl_weights is None else kl_weights.to(dtype).unsqueeze(1))
        gradient = gradient + share * (mixed - velocity_ref.to(dtype).flatten(1))
    gradient = (gradient * (scale.to(dtype) / mixed.shape[1])).view(velocity.shape)
    uncond_dtype = None if velocity_uncond is None else velocity_uncond.dtype
    return split_guidance(gradient, velocity.dtype, uncond_dtype, guidance)


def loss_then_gradient(
    branch_loss: Callable, gradient_of: Callable, velocity: Tensor, velocity_old: Tensor, advantages: Tensor,
    weights: Tensor, coef: Tensor, key: Tensor | None, noise: Tensor | None, velocity_ref: Tensor | None,
    velocity_uncond: Tensor | None, kl_weights: Tensor | None, clip_low: float, clip_high: float, kl_coef: float,
    guidance: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator `branch_loss_gradient` made of `branch_loss` and `velocity_gradient` of a backend.

    Returns:
        loss (), statistics (7,), and the fp32 gradient in the guided velocity.
    """
    velocity = guided(velocity, velocity_uncond, guidance, torch.float32)
    shared = (coef, key, noise, velocity_ref, None, kl_weights)
    loss, stats, slopes = branch_loss(
        velocity, velocity_old, advantages, weights, *shared, clip_low, clip_high, kl_coef, 1.0
    )
    gradient, _ = gradient_of(slopes, torch.ones_like(loss), velocity, velocity_old, *shared, kl_coef, 1.0)
    return loss, stats, gradient


def split_guidance(
    gradient: Tensor, dtype: torch.dtype, uncond_dtype: torch.dtype | None, guidance: float
) -> tuple[Tensor, Tensor]:
    """Gradient of the mixed velocity to those of its two halves, each in its dtype; the second empty without one."""
    if uncond_dtype is None:
        return gradient.to(dtype), gradient.new_empty(0)
    return (guidance * gradient).to(dtype), ((1 - guidance) * gradient).to(uncond_dtype)
