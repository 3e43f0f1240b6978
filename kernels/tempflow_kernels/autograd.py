"""The autograd formula of each differentiable operator: one for all backends.

Two ways for the loss. On GPUs the forward operator returns `slopes`, the (R, K) derivatives of the loss with respect to
the log-ratios, and the gradient operator turns them into the velocity gradient in the backward pass, where it folds in
the incoming scalar and writes the gradient once, in its final dtype: a finished gradient stored in the forward would
cost 8 bytes more of traffic per element. On CPUs drawing the noise costs more than memory: the forward finishes the
gradient, in fp32, so that each noise is drawn once instead of twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import library  # noqa: F401 - registers the operators
from ._ops import ops
from .plain.gradients import split_guidance


class LogProb(torch.autograd.Function):
    """`transition_log_prob`, differentiable in velocity."""

    @staticmethod
    def forward(ctx, next_latents: Tensor, latents: Tensor, velocity: Tensor, coef: Tensor) -> Tensor:
        ctx.save_for_backward(next_latents, latents, velocity, coef)
        return ops.transition_log_prob(next_latents, latents, velocity, coef)

    @staticmethod
    def backward(ctx, slopes: Tensor):
        return None, None, ops.transition_log_prob_gradient(slopes, *ctx.saved_tensors), None


class LogRatio(torch.autograd.Function):
    """`log_ratio`, differentiable in velocity."""

    @staticmethod
    def forward(ctx, velocity, velocity_old, coef, key, noise, siblings) -> Tensor:
        ctx.save_for_backward(velocity, velocity_old, coef, key, noise)
        return ops.log_ratio(velocity, velocity_old, coef, key, noise, siblings)

    @staticmethod
    def backward(ctx, slopes: Tensor):
        one = slopes.new_ones(())
        gradient, _ = ops.velocity_gradient(slopes, one, *ctx.saved_tensors, None, None, None, 0.0, 1.0)
        return gradient, None, None, None, None, None


class BranchLoss(torch.autograd.Function):
    """`branch_loss`, differentiable in velocity and velocity_uncond."""

    @staticmethod
    def forward(
        ctx, velocity, uncond, velocity_old, advantages, weights, coef, key, noise, ref, kl_weights, clip_range,
        kl_coef, guidance,
    ):  # fmt: skip
        loss, stats, slopes = ops.branch_loss(
            velocity, velocity_old, advantages, weights, coef, key, noise, ref, uncond, kl_weights, *clip_range,
            kl_coef, guidance,
        )  # fmt: skip
        ctx.save_for_backward(slopes, velocity, velocity_old, coef, key, noise, ref, uncond, kl_weights)
        ctx.numbers = (kl_coef, guidance)
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx, scale: Tensor, _):
        slopes, *tensors = ctx.saved_tensors
        gradient, uncond_gradient = ops.velocity_gradient(slopes, scale, *tensors, *ctx.numbers)
        uncond_gradient = uncond_gradient if ctx.needs_input_grad[1] else None
        return gradient, uncond_gradient, *[None] * 11


class BranchLossAtOnce(torch.autograd.Function):
    """The same with the gradient finished in the forward, for backends on which drawing noise is the larger cost."""

    @staticmethod
    def forward(
        ctx, velocity, uncond, velocity_old, advantages, weights, coef, key, noise, ref, kl_weights, clip_range,
        kl_coef, guidance,
    ):  # fmt: skip
        loss, stats, gradient = ops.branch_loss_gradient(
            velocity, velocity_old, advantages, weights, coef, key, noise, ref, uncond, kl_weights, *clip_range,
            kl_coef, guidance,
        )  # fmt: skip
        ctx.save_for_backward(gradient)
        ctx.halves = (velocity.dtype, None if uncond is None else uncond.dtype, guidance)
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx, scale: Tensor, _):
        (gradient,) = ctx.saved_tensors
        gradient, uncond_gradient = split_guidance(gradient * scale, *ctx.halves)
        uncond_gradient = uncond_gradient if ctx.needs_input_grad[1] else None
        return gradient, uncond_gradient, *[None] * 11
