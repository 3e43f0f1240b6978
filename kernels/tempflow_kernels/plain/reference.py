"""The affine-Gaussian sampler step and its policy-gradient loss, in plain torch: the definition of every operator.

One step of any flow sampler is `next = x_coef * x + v_coef * v + std * noise` with scalars per row, so the operators
know neither sigma nor the kind of SDE. Shapes: R rows (one network output each), K siblings that share a row, D...
one latent, d its number of elements. `coef` is (R, 3): x_coef, v_coef, std. A row with std = 0 is an ODE step: it
draws no noise and its log-probability and log-ratio are 0 by definition.

Computation is fp32, or float64 when an input is float64 (the oracle of the tests). Noise is always drawn in fp32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .philox import normal


class BranchLossStats(NamedTuple):
    """What one loss call saw, as 0-d tensors without gradient; averages run over all R x K branches."""

    ratio_mean: Tensor
    ratio_max: Tensor
    clip_fraction: Tensor
    """Share of branches whose ratio lies outside the clip range."""
    approx_kl: Tensor
    """Mean of `ratio - 1 - log_ratio`, an unbiased low-variance estimate of KL(old || new)."""
    kl: Tensor
    """Mean over rows of the weighted KL to the reference policy, before `kl_coef`."""
    log_ratio_mean: Tensor
    """Mean of |log_ratio|."""
    log_ratio_max: Tensor
    """Maximum of |log_ratio|."""


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor is float64, else float32."""
    doubles = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if doubles else torch.float32


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """(R,) scalars shaped (R, 1, ...) so that they broadcast over `like` (R, ...)."""
    return values.view(-1, *[1] * (like.dim() - 1))


def guided(velocity: Tensor, velocity_uncond: Tensor | None, guidance: float, dtype: torch.dtype) -> Tensor:
    """Classifier-free guidance `v_uncond + guidance * (v - v_uncond)`; `velocity` itself without a second half."""
    if velocity_uncond is None:
        return velocity.to(dtype)
    uncond = velocity_uncond.to(dtype)
    return uncond + guidance * (velocity.to(dtype) - uncond)


def normal_like(latents: Tensor, key: Tensor, siblings: int = 1) -> Tensor:
    """The noise that `transition_step` draws: (R, K, D...) fp32, a pure function of `key` (R, 2)."""
    elements = latents[0].numel()
    return normal(key, siblings, elements).view(latents.shape[0], siblings, *latents.shape[1:])


def transition_step(
    latents: Tensor,
    velocity: Tensor,
    coef: Tensor,
    key: Tensor,
    siblings: int = 1,
    velocity_uncond: Tensor | None = None,
    guidance: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """One sampler step for K siblings of every row.

    Args:
        latents, velocity, velocity_uncond: (R, D...).
        coef: (R, 3) x_coef, v_coef, std.
        key: (R, 2) int64 noise keys.
    Returns:
        next_latents (R, K, D...) and log_prob (R, K): the mean over the d elements of the Gaussian log-density.
    """
    dtype = compute_dtype(latents, velocity, coef)
    x_coef, v_coef, std = coef.to(dtype).unbind(1)
    mean = per_row(x_coef, latents) * latents.to(dtype)
    mean = mean + per_row(v_coef, latents) * guided(velocity, velocity_uncond, guidance, dtype)
    if not torch.any(std > 0):
        repeated = mean.unsqueeze(1).expand(-1, siblings, *mean.shape[1:]).contiguous()
        return repeated, mean.new_zeros(latents.shape[0], siblings)
    noise = normal_like(latents, key, siblings).to(dtype)
    next_latents = mean.unsqueeze(1) + per_row(std, noise) * noise
    square = noise.square().flatten(2).mean(2)
    return next_latents, _gaussian_log_prob(square, std)


def _gaussian_log_prob(square: Tensor, std: Tensor) -> Tensor:
    """(R, K) mean log-density from (R, K) mean squared standardised residuals; 0 where std = 0."""
    stochastic = std > 0
    log_std = torch.log(torch.where(stochastic, std, 1.0))
    log_prob = -0.5 * square - log_std.unsqueeze(1) - 0.5 * math.log(2.0 * math.pi)
    return torch.where(stochastic.unsqueeze(1), log_prob, 0.0)


def transition_log_prob(next_latents: Tensor, latents: Tensor, velocity: Tensor, coef: Tensor) -> Tensor:
    """Log-density of given next latents, mean over the d elements: (R, K). Differentiable in `velocity`.

    Args:
        next_latents: (R, K, D...); latents, velocity: (R, D...); coef: (R, 3).
    """
    dtype = compute_dtype(next_latents, latents, velocity, coef)
    x_coef, v_coef, std = coef.to(dtype).unbind(1)
    mean = per_row(x_coef, latents) * latents.to(dtype) + per_row(v_coef, latents) * velocity.to(dtype)
    residual = next_latents.to(dtype) - mean.unsqueeze(1)
    standardised = residual / per_row(torch.where(std > 0, std, 1.0), residual)
    return _gaussian_log_prob(standardised.square().flatten(2).mean(2), std)


def log_ratio(
    velocity: Tensor,
    velocity_old: Tensor,
    coef: Tensor,
    key: Tensor | None = None,
    siblings: int | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """log(new density / old density) of branches drawn from the old velocity: (R, K). Differentiable in `velocity`.

    With `delta = v_old - v_new` and the noise that was drawn, x cancels:
    `log_ratio_j = -(v_coef^2 |delta|^2 + 2 v_coef std <delta, noise_j>) / (2 std^2 d)`.
    The difference is formed per element, before any sum, so nothing cancels between two large sums.

    Args:
        velocity, velocity_old: (R, D...).
        key, siblings: the keys (R, 2) and K with which the branches were drawn; or
        noise: (R, K, D...) = (next_latents - mean_old) / std.
    """
    dtype = compute_dtype(velocity, velocity_old, coef, noise)
    if noise is None:
        noise = normal_like(velocity, key, siblings)
    _, v_coef, std = coef.to(dtype).unbind(1)
    stochastic = std > 0
    sensitivity = torch.where(stochastic, v_coef / torch.where(stochastic, std, 1.0), 0.0).unsqueeze(1)
    delta = (velocity_old.to(dtype) - velocity.to(dtype)).flatten(1).unsqueeze(1)
    square = delta.square().mean(2)
    product = (delta * noise.to(dtype).flatten(2)).mean(2)
    return -(0.5 * sensitivity.square() * square + sensitivity * product)


def branch_loss(
    velocity: Tensor,
    velocity_old: Tensor,
    advantages: Tensor,
    weights: Tensor,
    coef: Tensor,
    key: Tensor | None = None,
    noise: Tensor | None = None,
    clip_range: tuple[float, float] = (1e-4, 1e-4),
    kl_coef: float = 0.0,
    velocity_ref: Tensor | None = None,
    velocity_uncond: Tensor | None = None,
    guidance: float = 1.0,
    kl_weights: Tensor | None = None,
) -> tuple[Tensor, BranchLossStats]:
    """Weighted clipped policy-gradient loss of K siblings that share one velocity, plus the KL to a reference policy.

    `loss = mean_{r,j} max(-w A ratio, -w A clip(ratio, 1 - low, 1 + high)) + kl_coef * mean_r kl_w KL_r` with
    `KL_r = v_coef^2 / (2 std^2) * mean((v - v_ref)^2)` (equal std on both sides; TempFlow-GRPO eq. of the objective,
    Flow-GRPO section 4). `ratio - 1` is carried by expm1, so a clip range of 1e-5 keeps its resolution in fp32.

    Args:
        velocity, velocity_old, velocity_ref, velocity_uncond: (R, D...); gradients reach the first and the last.
        advantages: (R, K). weights: (R,), 0 removes a row's policy gradient but keeps it in the mean.
        coef: (R, 3). key: (R, 2) or noise: (R, K, D...), exactly one of them.
        clip_range: (low, high). kl_weights: (R,) factors of the KL per row, default 1.
    Returns:
        loss (), differentiable, and its statistics.
    """
    dtype = compute_dtype(velocity, velocity_old, advantages, coef, noise)
    velocity = guided(velocity, velocity_uncond, guidance, dtype)
    log_ratios = log_ratio(velocity, velocity_old, coef, key, advantages.shape[1], noise)
    low, high = clip_range
    gain = weights.to(dtype).unsqueeze(1) * advantages.to(dtype)
    kl = reference_kl(velocity, velocity_ref, coef.to(dtype), kl_weights)
    stats = branch_stats(log_ratios.detach(), kl.detach(), low, high)
    return clipped_objective(log_ratios, gain, low, high) + kl_coef * kl, stats


def clipped_objective(log_ratios: Tensor, gain: Tensor, low: float, high: float) -> Tensor:
    """Mean of `max(-gain * ratio, -gain * clip(ratio, 1 - low, 1 + high))`, gain = weight * advantage (R, K)."""
    excess = torch.expm1(log_ratios)
    surrogate = torch.maximum(-gain * excess, -gain * excess.clamp(-low, high))
    return (surrogate - gain).mean()


def reference_kl(velocity: Tensor, velocity_ref: Tensor | None, coef: Tensor, kl_weights: Tensor | None) -> Tensor:
    """Mean over rows of the weighted Gaussian KL to the reference policy; 0 without one, rows with std = 0 give 0."""
    if velocity_ref is None:
        return velocity.new_zeros(())
    _, v_coef, std = coef.unbind(1)
    stochastic = std > 0
    scale = torch.where(stochastic, 0.5 * (v_coef / torch.where(stochastic, std, 1.0)).square(), 0.0)
    if kl_weights is not None:
        scale = scale * kl_weights.to(scale.dtype)
    return (scale * (velocity - velocity_ref.to(velocity.dtype)).flatten(1).square().mean(1)).mean()


def branch_stats(log_ratios: Tensor, kl: Tensor, low: float, high: float) -> BranchLossStats:
    """Statistics of (R, K) log-ratios."""
    excess = torch.expm1(log_ratios)
    outside = (excess < -low) | (excess > high)
    magnitude = log_ratios.abs()
    return BranchLossStats(
        ratio_mean=1 + excess.mean(),
        ratio_max=1 + excess.max(),
        clip_fraction=outside.to(excess.dtype).mean(),
        approx_kl=(excess - log_ratios).mean(),
        kl=kl,
        log_ratio_mean=magnitude.mean(),
        log_ratio_max=magnitude.max(),
    )
