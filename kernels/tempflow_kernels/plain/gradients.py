"""Analytic gradients of the operators, in plain torch: what the fused gradient kernels compute.

`slopes` are derivatives of a scalar with respect to the (R, K) log-probabilities or log-ratios. Everything a velocity
gradient needs besides tensors of the size of the velocity is in them, so one formula serves every backend and every
loss that is a function of log-ratios.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .reference import Branches, compute_dtype, normal_like, per_row


def transition_log_prob_gradient(
    slopes: Tensor, next_latents: Tensor, latents: Tensor, velocity: Tensor, coef: Tensor
) -> Tensor:
    """`sum_j slope_j v_coef (next_j - mean) / (std^2 d)`, in the shape and dtype of `velocity`."""
    dtype = compute_dtype(next_latents, latents, velocity, coef)
    x_coef, v_coef, std = coef.to(dtype).unbind(1)
    mean = per_row(x_coef, latents) * latents.to(dtype) + per_row(v_coef, latents) * velocity.to(dtype)
    residual = (next_latents.to(dtype) - mean.unsqueeze(1)).flatten(2)
    scale = torch.where(std > 0, v_coef / torch.where(std > 0, std, 1.0).square(), 0.0) / residual.shape[2]
    gradient = torch.einsum("rk,rkd->rd", slopes.to(dtype) * scale.unsqueeze(1), residual)
    return gradient.view(velocity.shape).to(velocity.dtype)


def branch_slopes(log_ratios: Tensor, gain: Tensor, low: float, high: float) -> Tensor:
    """Derivative of the clipped objective with respect to the log-ratios: `-gain * ratio / (R K)`, 0 where clipped."""
    excess = torch.expm1(log_ratios)
    active = -gain * excess >= -gain * excess.clamp(-low, high)
    return torch.where(active, -gain * (1 + excess), 0.0) / log_ratios.numel()


def velocity_gradient(branches: Branches, slopes: Tensor, scale: Tensor, forward_noise: str = "") -> Tensor:
    """Gradient of `scale * loss` in `velocity`, in its shape and dtype.

    With `dv = v_old - v` and slopes g_j:
    `scale / d * (2 square (sum_j g_j) dv + product sum_j g_j noise_j + 2 kl_coef kl (v - v_ref) / R)`.

    Args:
        branches: as in the loss. slopes: (R, K) fp32. scale: () fp32. forward_noise: no matter, always exact here.
    """
    dtype = compute_dtype(*branches.tensors())
    rows, siblings = slopes.shape
    noise = normal_like(branches.velocity, branches.key, siblings) if branches.noise is None else branches.noise
    _, square, product, kl = branches.terms.to(dtype).unsqueeze(2).unbind(1)
    velocity, slopes = branches.velocity.to(dtype).flatten(1), slopes.to(dtype)
    delta = branches.velocity_old.to(dtype).flatten(1) - velocity
    total = 2 * square * slopes.sum(1, keepdim=True) * delta
    total = total + product * torch.einsum("rk,rkd->rd", slopes, noise.to(dtype).flatten(2))
    if branches.velocity_ref is not None:
        distance = velocity - branches.velocity_ref.to(dtype).flatten(1)
        total = total + 2 * branches.kl_coef / rows * kl * distance
    total = total * (scale.to(dtype) / velocity.shape[1])
    return total.view(branches.velocity.shape).to(branches.velocity.dtype)


def loss_then_gradient(
    branch_loss: Callable, gradient_of: Callable, branches: Branches, advantages: Tensor, clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator `branch_loss_gradient` made of `branch_loss` and `velocity_gradient` of a backend.

    Returns:
        loss (), statistics (7,), and the fp32 gradient in `velocity`.
    """
    branches = branches._replace(velocity=branches.velocity.float())
    loss, stats, slopes = branch_loss(branches, advantages, clip_low, clip_high)
    return loss, stats, gradient_of(branches, slopes, torch.ones_like(loss))
