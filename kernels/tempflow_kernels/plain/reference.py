"""The affine-Gaussian sampler step and its policy-gradient loss, in plain torch: the definition of every operator.

One step of any flow sampler is `next = x_coef * x + v_coef * v + std * noise` with scalars per row, so the operators
know neither sigma nor the kind of SDE. Shapes: R rows (one network output each), K siblings that share a row, D...
one latent, d its number of elements. `coef` is (R, 3): x_coef, v_coef, std. A row with std = 0 is an ODE step: it
draws no noise and its log-probability is 0 by definition. `terms` is (R, 4): what a method multiplies in the loss
(weight, square, product, kl); the loss knows methods by these numbers only.

Computation is fp32, or float64 when an input is float64 (the oracle of the tests). Noise is always drawn in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .philox import normal


class Branches(NamedTuple):
    """What the log-ratio, the loss and its gradient read of R rows: the arguments that these operators share."""

    velocity: Tensor
    """(R, D...), that of the policy in training."""
    velocity_old: Tensor
    """(R, D...), that of the policy that drew the branches."""
    terms: Tensor
    """(R, 4): weight, square, product, kl."""
    key: Tensor | None = None
    """(R, 2) int64, the keys of the noise; or"""
    noise: Tensor | None = None
    """(R, K, D...) = (next_latents - mean_old) / std."""
    velocity_ref: Tensor | None = None
    """(R, D...), that of the policy before training."""
    kl_coef: float = 0.0

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The fields whose dtype decides the precision."""
        return self.velocity, self.velocity_old, self.terms, self.noise, self.velocity_ref


class Figure:
    """One named number of `BranchLossStats`, a view that is made when it is asked for."""

    def __init__(self, place: int):
        self.place = place

    def __get__(self, stats: BranchLossStats | None, _=None) -> Tensor | Figure:
        return self if stats is None else stats.table[self.place]


class BranchLossStats:
    """What one loss call saw, as 0-d tensors without gradient; averages run over all R x K branches.

    Named, and in this order by iteration, indexing and `table`.
    """

    ratio_mean = Figure(0)
    ratio_max = Figure(1)
    clip_fraction = Figure(2)
    """Share of branches whose ratio lies outside the clip range."""
    approx_kl = Figure(3)
    """Mean of `ratio - 1 - log_ratio`, an unbiased low-variance estimate of KL(old || new)."""
    kl = Figure(4)
    """Mean over rows of the KL to the reference policy with its factor from `terms`, before `kl_coef`."""
    log_ratio_mean = Figure(5)
    """Mean of |log_ratio|."""
    log_ratio_max = Figure(6)
    """Maximum of |log_ratio|."""
    _fields = ("ratio_mean", "ratio_max", "clip_fraction", "approx_kl", "kl", "log_ratio_mean", "log_ratio_max")

    def __init__(self, table: Tensor):
        self.table = table
        """(7,) all of them"""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.table.unbind())

    def __len__(self) -> int:
        return len(self._fields)

    def __getitem__(self, place: int) -> Tensor:
        return self.table[place]

    def __repr__(self) -> str:
        return f"BranchLossStats({', '.join(f'{name}={float(getattr(self, name)):g}' for name in self._fields)})"


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


def gaussian_terms(coef: Tensor, weights: Tensor | None, kl_weights: Tensor | None) -> Tensor:
    """(R, 4) terms of the Gaussian step with `coef` (R, 3): see `ops.gaussian_terms`."""
    _, v_coef, std = coef.double().unbind(1)
    product = torch.where(std == 0, 0.0, v_coef / torch.where(std == 0, 1.0, std))
    product = torch.where(std < 0, math.nan, product)  # a negative std must show
    square = product.square() / 2
    ones = torch.ones_like(square)
    weight, kl_weight = (ones if column is None else column.double() for column in (weights, kl_weights))
    return torch.stack([weight, square, product, square * kl_weight], dim=1).to(compute_dtype(coef))


def log_ratio(branches: Branches, siblings: int) -> Tensor:
    """log(new density / old density) of branches drawn from the old velocity: (R, K). Differentiable in `velocity`.

    With `dv = v_old - v` and the noise that was drawn, x cancels out of the difference of the two densities:
    `log_ratio_j = -(square * mean(dv^2) + product * mean(dv * noise_j))`.
    It is formed per element, before any sum, so nothing cancels between two large sums.

    Args:
        branches: its `terms` hold square and product; 0 in both gives 0.
        siblings: K.
    """
    dtype = compute_dtype(branches.velocity, branches.velocity_old, branches.terms, branches.noise)
    noise = normal_like(branches.velocity, branches.key, siblings) if branches.noise is None else branches.noise
    _, square, product, _ = branches.terms.to(dtype).unsqueeze(2).unbind(1)  # (R, 1) each
    delta = (branches.velocity_old.to(dtype) - branches.velocity.to(dtype)).flatten(1).unsqueeze(1)
    return -(square * delta.square().mean(2) + product * (delta * noise.to(dtype).flatten(2)).mean(2))


def branch_loss(
    branches: Branches, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, BranchLossStats]:
    """Weighted clipped policy-gradient loss of K siblings that share one velocity, plus the KL to a reference policy.

    `loss = mean_{r,j} max(-w A ratio, -w A clip(ratio, 1 - low, 1 + high)) + kl_coef * mean_r kl_r mean((v - v_ref)^2)`
    with w and kl from `terms`. Sources: TempFlow-GRPO, the equation of the objective; Flow-GRPO (arXiv 2505.05470),
    section 4. `ratio - 1` is carried by expm1, so a clip range of 1e-5 keeps its resolution in fp32.

    Args:
        branches: what is read of the R rows. advantages: (R, K).
        clip_low, clip_high: distance of the bounds of the ratio from 1.
    Returns:
        loss (), differentiable, and its statistics.
    """
    return loss_parts(branches, advantages, clip_low, clip_high)[:2]


def loss_parts(
    branches: Branches, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, BranchLossStats, Tensor, Tensor]:
    """The loss, its statistics, and what its derivative is made of: log-ratios (R, K) and weight * advantage (R, K)."""
    dtype = compute_dtype(advantages, *branches.tensors())
    branches = branches._replace(velocity=branches.velocity.to(dtype), terms=branches.terms.to(dtype))
    log_ratios = log_ratio(branches, advantages.shape[1])
    gain = branches.terms[:, :1] * advantages.to(dtype)
    kl = reference_kl(branches)
    stats = branch_stats(log_ratios.detach(), kl.detach(), clip_low, clip_high)
    loss = clipped_objective(log_ratios, gain, clip_low, clip_high) + branches.kl_coef * kl
    return loss, stats, log_ratios, gain


def clipped_objective(log_ratios: Tensor, gain: Tensor, low: float, high: float) -> Tensor:
    """Mean of `max(-gain * ratio, -gain * clip(ratio, 1 - low, 1 + high))`, gain = weight * advantage (R, K)."""
    excess = torch.expm1(log_ratios)
    surrogate = torch.maximum(-gain * excess, -gain * excess.clamp(-low, high))
    return (surrogate - gain).mean()


def reference_kl(branches: Branches) -> Tensor:
    """Mean over rows of `kl * mean((v - v_ref)^2)`; 0 without a reference policy."""
    velocity, kl = branches.velocity, branches.terms[:, 3]
    if branches.velocity_ref is None:
        return velocity.new_zeros(())
    return (kl * (velocity - branches.velocity_ref.to(velocity.dtype)).flatten(1).square().mean(1)).mean()


def branch_stats(log_ratios: Tensor, kl: Tensor, low: float, high: float) -> BranchLossStats:
    """Statistics of (R, K) log-ratios."""
    excess = torch.expm1(log_ratios)
    outside = (excess < -low) | (excess > high)
    magnitude = log_ratios.abs()
    outside = outside.to(excess.dtype).mean()
    approx_kl = (excess - log_ratios).mean()
    figures = (1 + excess.mean(), 1 + excess.max(), outside, approx_kl, kl, magnitude.mean(), magnitude.max())
    return BranchLossStats(torch.stack(figures))
