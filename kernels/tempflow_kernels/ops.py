"""Public operators: argument checks, then the fused operator of the backend that serves the device.

Which function answers a call is found by `_..._route` together with the checks, once per combination of shapes, dtypes,
devices, numbers and grad mode. The plain-torch definition in `reference` answers when it alone can do the job: for
float64 arguments (the oracle), and when a gradient is asked for in an argument that the fused operators are not
differentiable in.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from . import autograd
from .checks import (
    PRECISE,
    Checked,
    check_coef,
    check_count,
    check_guidance,
    check_key,
    check_like,
    check_noise_source,
    check_number,
    check_rows,
    check_std,
    check_tensor,
    expect,
)  # fmt: skip
from .library import CHOSEN, run
from .plain import reference
from .plain.reference import Branches, BranchLossStats, compute_dtype


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _only_reference(*tensors: Tensor | None, constants: tuple[Tensor | None, ...] = ()) -> bool:
    """float64 among the tensors, or a gradient wanted in one that is a constant to the fused operators."""
    return _wants_gradient(*constants) or compute_dtype(*tensors, *constants) == torch.float64


def normal_like(latents: Tensor, key: Tensor, siblings: int = 1) -> Tensor:
    """The noise that `transition_step` draws.

    Args:
        latents: (R, D...), only its shape and device count (float64: drawn by the plain-torch definition).
        key: (R, 2) int64, `(seed, offset)` per row (see `philox`).
        siblings: K.
    Returns:
        (R, K, D...) fp32.
    Raises:
        ValueError: an argument of the wrong type, shape, dtype or device.
    """
    return _normal_route(latents, key, siblings)(latents, key, siblings)


@Checked
def _normal_route(latents, key, siblings) -> Callable:
    check_rows("latents", latents)
    check_key(key, latents)
    check_count("siblings", siblings)
    return reference.normal_like if latents.dtype == torch.float64 else _fused_normal


def _fused_normal(latents: Tensor, key: Tensor, siblings: int) -> Tensor:
    rows, *shape = latents.shape
    return run("normal", key, siblings, latents.numel() // rows).view(rows, siblings, *shape)


def transition_step(
    latents: Tensor,
    velocity: Tensor,
    coef: Tensor,
    key: Tensor,
    siblings: int = 1,
    velocity_uncond: Tensor | None = None,
    guidance: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """One sampler step for K siblings of every row: `next = x_coef x + v_coef v + std noise`.

    Args:
        latents, velocity, velocity_uncond: (R, D...), any float dtype, any strides; with `velocity_uncond` the
            velocity is `velocity_uncond + guidance (velocity - velocity_uncond)`.
        coef: (R, 3) fp32 x_coef, v_coef, std; std = 0 is an ODE step.
        key: (R, 2) int64 noise keys.
        siblings: K.
    Returns:
        next_latents (R, K, D...) and log_prob (R, K), fp32 (float64 if an input is): the mean over the d elements of
        the Gaussian log-density, as in Flow-GRPO (arXiv 2505.05470); 0 for ODE rows.
    Raises:
        ValueError: an argument of the wrong type, shape, dtype or device, or a negative std.
    """
    arguments = latents, velocity, coef, key, siblings, velocity_uncond, guidance
    route = _step_route(*arguments)
    check_std(coef)
    return route(*arguments)


@Checked
def _step_route(latents, velocity, coef, key, siblings, velocity_uncond, guidance) -> Callable:
    check_rows("latents", latents)
    check_like(latents, velocity=velocity, velocity_uncond=velocity_uncond)
    check_coef(coef, latents)
    check_key(key, latents)
    check_count("siblings", siblings)
    check_guidance(guidance, velocity_uncond)
    only_reference = _only_reference(constants=(latents, velocity, coef, velocity_uncond))
    return reference.transition_step if only_reference else partial(run, "transition_step")


def transition_log_prob(next_latents: Tensor, latents: Tensor, velocity: Tensor, coef: Tensor) -> Tensor:
    """Log-density of given next latents, mean over the d elements; differentiable in `velocity`.

    Args:
        next_latents: (R, K, D...). latents, velocity: (R, D...). coef: (R, 3) fp32.
    Returns:
        (R, K) fp32 (float64 if an input is); 0 for rows with std = 0.
    Raises:
        ValueError: an argument of the wrong type, shape, dtype or device, or a negative std.
    """
    arguments = next_latents, latents, velocity, coef
    route = _log_prob_route(*arguments)
    check_std(coef)
    return route(*arguments)


@Checked
def _log_prob_route(next_latents, latents, velocity, coef) -> Callable:
    check_rows("latents", latents)
    check_like(latents, velocity=velocity)
    check_coef(coef, latents)
    siblings = next_latents.shape[1] if isinstance(next_latents, Tensor) and next_latents.dim() > 1 else 1
    check_tensor("next_latents", next_latents, (latents.shape[0], siblings, *latents.shape[1:]), latents.device)
    if _only_reference(velocity, constants=(next_latents, latents, coef)):
        return reference.transition_log_prob
    return autograd.LogProb.apply if _wants_gradient(velocity) else partial(run, "transition_log_prob")


def log_ratio(
    velocity: Tensor,
    velocity_old: Tensor,
    coef: Tensor,
    key: Tensor | None = None,
    siblings: int | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """log(new density / old density) of branches drawn from the old velocity; differentiable in `velocity`.

    The difference of the two densities is formed per element before any sum (see `reference.log_ratio`).

    Args:
        velocity, velocity_old: (R, D...). coef: (R, 3) fp32.
        key, siblings: keys (R, 2) and K with which the branches were drawn; or
        noise: (R, K, D...) = (next_latents - mean_old) / std.
    Returns:
        (R, K) fp32 (float64 if an input is); 0 for rows with std = 0.
    Raises:
        ValueError: an argument of the wrong type, shape, dtype or device, a negative std, or not exactly one of key
            and noise.
    """
    route = _log_ratio_route(velocity, velocity_old, coef, key, siblings, noise)
    check_std(coef)
    siblings = siblings if noise is None else noise.shape[1]
    return route(Branches(velocity, velocity_old, reference.gaussian_terms(coef, None, None), key, noise), siblings)


@Checked
def _log_ratio_route(velocity, velocity_old, coef, key, siblings, noise) -> Callable:
    check_rows("velocity", velocity)
    check_like(velocity, velocity_old=velocity_old)
    check_coef(coef, velocity)
    check_noise_source(key, noise, siblings, velocity)
    if _only_reference(velocity, constants=(velocity_old, coef, noise)):
        return reference.log_ratio
    return _trained_log_ratio if _wants_gradient(velocity) else _fused_log_ratio


def _trained_log_ratio(branches: Branches, siblings: int) -> Tensor:
    return autograd.LogRatio.apply(siblings, *branches)


def _fused_log_ratio(branches: Branches, siblings: int) -> Tensor:
    return run("log_ratio", *branches, siblings)


def gaussian_terms(coef: Tensor, weights: Tensor | None = None, kl_weights: Tensor | None = None) -> Tensor:
    """The `terms` of `branch_loss` for Gaussian steps: `(weight, s^2 / 2, s, kl_weight s^2 / 2)` with s = v_coef / std.

    With them the log-ratio is that of the two Gaussians of a step, and the KL term is their KL divergence, per element
    (equal std on both sides). Rows with std = 0 get square = product = kl = 0. Source: Flow-GRPO (arXiv 2505.05470).

    Args:
        coef: (R, 3) fp32 x_coef, v_coef, std. weights, kl_weights: (R,) any float dtype, default 1.
    Returns:
        (R, 4) weight, square, product, kl; computed in float64 and rounded once to the dtype of `coef`.
    Raises:
        ValueError: an argument of the wrong type, shape, dtype or device, or a negative std.
    """
    check_rows("coef", coef)
    check_coef(coef, coef)
    check_std(coef)
    for name, column in (("weights", weights), ("kl_weights", kl_weights)):
        if column is not None:
            check_tensor(name, column, coef.shape[:1], coef.device)
    return reference.gaussian_terms(coef, weights, kl_weights)


def branch_loss(
    velocity: Tensor,
    velocity_old: Tensor,
    advantages: Tensor,
    terms: Tensor,
    key: Tensor | None = None,
    noise: Tensor | None = None,
    clip_range: tuple[float, float] = (1e-4, 1e-4),
    kl_coef: float = 0.0,
    velocity_ref: Tensor | None = None,
) -> tuple[Tensor, BranchLossStats]:
    """Weighted clipped policy-gradient loss of K siblings that share one velocity, plus the KL to a reference policy.

    Formula and sources: `reference.branch_loss`. Differentiable in `velocity`.

    Args:
        velocity, velocity_old, velocity_ref: (R, D...), any float dtype, any strides.
        advantages: (R, K).
        terms: (R, 4) fp32, what the method multiplies in each row (`gaussian_terms` builds those of Gaussian steps):
            weight of the policy loss (0 keeps a row in the mean without gradient), square and product of
            `log_ratio_j = -(square * mean(dv^2) + product * mean(dv * noise_j))` with dv = velocity_old - velocity,
            and kl of `kl_coef * mean_r kl_r * mean((velocity - velocity_ref)^2)`.
        key: (R, 2) int64 or noise: (R, K, D...), exactly one of them.
        clip_range: (low, high) and kl_coef: Python numbers.
    Returns:
        loss () fp32 (float64 if an input is) and its statistics.
    Raises:
        ValueError: an argument of the wrong type, shape, dtype or device, or not exactly one of key and noise.
    """
    branches = Branches(velocity, velocity_old, terms, key, noise, velocity_ref, kl_coef)
    low, high = _pair(clip_range)
    return _loss_route(advantages, low, high, *branches)(branches, advantages, low, high)


@Checked
def _loss_route(advantages, low, high, *fields) -> Callable:
    branches = Branches(*fields)
    _check_branch_loss(branches, advantages, low, high)
    velocity, *constants = branches.tensors()
    if _only_reference(velocity, constants=(advantages, *constants)):
        return reference.branch_loss
    if not _wants_gradient(velocity):
        return _fused_loss
    is_native = CHOSEN.get(velocity.device.type.upper()) == "native"
    return partial(_trained_loss, autograd.BranchLossAtOnce if is_native else autograd.BranchLoss)


def _fused_loss(branches: Branches, advantages: Tensor, low: float, high: float) -> tuple[Tensor, BranchLossStats]:
    loss, table, _ = run("branch_loss", *branches, advantages, low, high)
    return loss, BranchLossStats(table)


def _trained_loss(
    function: type[torch.autograd.Function], branches: Branches, advantages: Tensor, low: float, high: float
) -> tuple[Tensor, BranchLossStats]:
    loss, table = function.apply(advantages, low, high, *branches)
    return loss, BranchLossStats(table)


def _check_branch_loss(branches: Branches, advantages, low, high) -> None:
    velocity, velocity_ref, kl_coef = branches.velocity, branches.velocity_ref, branches.kl_coef
    check_rows("velocity", velocity)
    check_like(velocity, velocity_old=branches.velocity_old, velocity_ref=velocity_ref)
    siblings = advantages.shape[1] if isinstance(advantages, Tensor) and advantages.dim() == 2 else 1
    check_tensor("advantages", advantages, (velocity.shape[0], max(siblings, 1)), velocity.device)
    check_tensor("terms", branches.terms, (velocity.shape[0], 4), velocity.device, PRECISE)
    for name, value in (("clip_range", low), ("clip_range", high), ("kl_coef", kl_coef)):
        check_number(name, value)
        expect(value >= 0, name, value, "a number >= 0")
    expect(velocity_ref is not None or kl_coef == 0, "velocity_ref", None, "a reference velocity where kl_coef > 0")
    check_noise_source(branches.key, branches.noise, siblings, velocity)


def _pair(clip_range) -> tuple:
    is_pair = isinstance(clip_range, (tuple, list)) and len(clip_range) == 2
    expect(is_pair, "clip_range", clip_range, "a pair (low, high)")
    return clip_range
