"""The autograd formula of each differentiable operator: one for all backends.

Two ways for the loss. On GPUs the forward operator returns `slopes`, the (R, K) derivatives of the loss with respect to
the log-ratios, and the gradient operator turns them into the velocity gradient in the backward pass, where it folds in
the incoming scalar and writes the gradient once, in its final dtype: a finished gradient stored in the forward would
cost 8 bytes more of traffic per element. On CPUs drawing the noise costs more than memory: the forward finishes the
gradient, in fp32, so that each noise is drawn once instead of twice.

`branches` are the fields of `Branches` one by one, of which the first, the velocity, gets a gradient. Statistics get no
gradient, and none is made up for them: that would be one more launch of a kernel. The noise mode of the forward goes
along: drawing other noise in the backward is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._ops import ops
from .library import run
from .noise_setting import noise_mode


def _gradient(name: str, *arguments) -> Tensor:
    """A gradient operator; under `create_graph` by the dispatcher, which knows it to have no gradient of its own."""
    return getattr(ops, name)(*arguments) if torch.is_grad_enabled() else run(name, *arguments)


class LogProb(torch.autograd.Function):
    """`transition_log_prob`, differentiable in velocity."""

    @staticmethod
    def forward(ctx, next_latents: Tensor, latents: Tensor, velocity: Tensor, coef: Tensor) -> Tensor:
        ctx.save_for_backward(next_latents, latents, velocity, coef)
        return run("transition_log_prob", next_latents, latents, velocity, coef)

    @staticmethod
    def backward(ctx, slopes: Tensor):
        return None, None, _gradient("transition_log_prob_gradient", slopes, *ctx.saved_tensors), None


class LogRatio(torch.autograd.Function):
    """`log_ratio`, differentiable in velocity."""

    @staticmethod
    def forward(ctx, siblings: int, *branches) -> Tensor:
        *tensors, ctx.kl_coef = branches
        ctx.noise_mode = noise_mode()
        ctx.save_for_backward(*tensors)
        return run("log_ratio", *branches, siblings)

    @staticmethod
    def backward(ctx, slopes: Tensor):
        one = slopes.new_ones(())
        gradient = _gradient("velocity_gradient", *ctx.saved_tensors, ctx.kl_coef, slopes, one, ctx.noise_mode)
        return None, gradient, None, None, None, None, None, None


NO_GRADIENTS = (None,) * 10
"""Of the arguments of the loss, where its own is not known: what comes after it does not depend on it."""


class BranchLoss(torch.autograd.Function):
    """`branch_loss`, differentiable in velocity."""

    @staticmethod
    def forward(ctx, advantages: Tensor, clip_low: float, clip_high: float, *branches) -> tuple[Tensor, Tensor]:
        *tensors, ctx.kl_coef = branches
        loss, stats, slopes = run("branch_loss", *branches, advantages, clip_low, clip_high)
        ctx.noise_mode = noise_mode()
        ctx.save_for_backward(slopes, *tensors)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return loss, stats

    @staticmethod
    def backward(ctx, scale: Tensor | None, _):
        if scale is None:
            return NO_GRADIENTS
        slopes, *tensors = ctx.saved_tensors
        gradient = _gradient("velocity_gradient", *tensors, ctx.kl_coef, slopes, scale, ctx.noise_mode)
        return None, None, None, gradient, None, None, None, None, None, None


class BranchLossAtOnce(torch.autograd.Function):
    """The same with the gradient finished in the forward, for backends on which drawing noise is the larger cost."""

    @staticmethod
    def forward(ctx, advantages: Tensor, clip_low: float, clip_high: float, *branches) -> tuple[Tensor, Tensor]:
        loss, stats, gradient = run("branch_loss_gradient", *branches, advantages, clip_low, clip_high)
        ctx.save_for_backward(gradient)
        ctx.dtype = branches[0].dtype
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return loss, stats

    @staticmethod
    def backward(ctx, scale: Tensor | None, _):
        if scale is None:
            return NO_GRADIENTS
        (gradient,) = ctx.saved_tensors
        return None, None, None, (gradient * scale).to(ctx.dtype), None, None, None, None, None, None
