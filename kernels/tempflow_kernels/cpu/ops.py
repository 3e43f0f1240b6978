"""The operators of the library on the C++ twin: contiguous memory, pointers, torch's thread count."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import Array, Batch, Branches, byref, call

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NOTHING = Array(None, 0)


class _Memory:
    """Contiguous copies that must outlive one call, and their C descriptions."""

    def __init__(self):
        self.kept: list[Tensor] = []

    def pointer(self, tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> int | None:
        if tensor is None:
            return None
        if tensor.dtype != dtype or not tensor.is_contiguous():
            tensor = tensor.to(dtype).contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()

    def array(self, tensor: Tensor | None) -> Array:
        return _NOTHING if tensor is None else Array(self.pointer(tensor, tensor.dtype), _TYPES[tensor.dtype])

    def batch(self, rows: Tensor, coef: Tensor | None, key: Tensor | None, siblings: int) -> Batch:
        count = rows.shape[0]
        return Batch(
            self.pointer(coef), self.pointer(key, torch.int64), count, siblings, rows.numel() // count,
            torch.get_num_threads(),
        )  # fmt: skip

    def branches(self, velocity, old, noise, ref=None, uncond=None, kl_weights=None, numbers=(1.0, 0.0, 0.0, 0.0)):
        arrays = (self.array(tensor) for tensor in (velocity, old, ref, uncond, noise))
        return Branches(*arrays, self.pointer(kl_weights), *(float(number) for number in numbers))


def _empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def normal(key: Tensor, siblings: int, elements: int) -> Tensor:
    memory, noise = _Memory(), _empty(key, key.shape[0], siblings, elements)
    batch = memory.batch(key, None, key, siblings)
    batch.elements = elements
    call("tfk_normal", batch, noise.data_ptr())
    return noise


def transition_step(latents, velocity, coef, key, siblings, velocity_uncond, guidance) -> tuple[Tensor, Tensor]:
    memory, rows = _Memory(), latents.shape[0]
    following, log_prob = _empty(latents, rows, siblings, *latents.shape[1:]), _empty(latents, rows, siblings)
    arrays = [memory.array(tensor) for tensor in (latents, velocity, velocity_uncond)]
    batch = memory.batch(latents, coef, key, siblings)
    call("tfk_transition_step", batch, *arrays, float(guidance), following.data_ptr(), log_prob.data_ptr())
    return following, log_prob


def transition_log_prob(next_latents, latents, velocity, coef) -> Tensor:
    memory, log_prob = _Memory(), _empty(latents, *next_latents.shape[:2])
    arrays = [memory.array(tensor) for tensor in (next_latents, latents, velocity)]
    call("tfk_transition_log_prob", memory.batch(latents, coef, None, log_prob.shape[1]), *arrays, log_prob.data_ptr())
    return log_prob


def transition_log_prob_gradient(slopes, next_latents, latents, velocity, coef) -> Tensor:
    memory, gradient = _Memory(), _empty(velocity, *velocity.shape, dtype=velocity.dtype)
    arrays = [memory.array(tensor) for tensor in (next_latents, latents, velocity)]
    batch = memory.batch(latents, coef, None, slopes.shape[1])
    call(
        "tfk_transition_log_prob_gradient", batch, *arrays, memory.pointer(slopes), gradient.data_ptr(),
        _TYPES[gradient.dtype],
    )  # fmt: skip
    return gradient


def log_ratio(velocity, velocity_old, coef, key, noise, siblings) -> Tensor:
    memory, ratios = _Memory(), _empty(velocity, velocity.shape[0], siblings)
    branches = memory.branches(velocity, velocity_old, noise)
    call("tfk_log_ratio", memory.batch(velocity, coef, key, siblings), byref(branches), ratios.data_ptr())
    return ratios


def _loss(
    function, result, velocity, velocity_old, advantages, weights, coef, key, noise, velocity_ref, velocity_uncond,
    kl_weights, numbers,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """loss, statistics and `result`, which is the slopes or the gradient."""
    memory, loss, stats = _Memory(), _empty(velocity), _empty(velocity, 7)
    branches = memory.branches(velocity, velocity_old, noise, velocity_ref, velocity_uncond, kl_weights, numbers)
    call(
        function, memory.batch(velocity, coef, key, advantages.shape[1]), byref(branches), memory.pointer(advantages),
        memory.pointer(weights), loss.data_ptr(), stats.data_ptr(), result.data_ptr(),
    )  # fmt: skip
    return loss, stats, result


def branch_loss(
    velocity, velocity_old, advantages, weights, coef, key, noise, velocity_ref, velocity_uncond, kl_weights,
    clip_low, clip_high, kl_coef, guidance,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    numbers = (guidance, kl_coef, clip_low, clip_high)
    return _loss(
        "tfk_branch_loss", _empty(velocity, *advantages.shape), velocity, velocity_old, advantages, weights, coef, key,
        noise, velocity_ref, velocity_uncond, kl_weights, numbers,
    )  # fmt: skip


def branch_loss_gradient(
    velocity, velocity_old, advantages, weights, coef, key, noise, velocity_ref, velocity_uncond, kl_weights,
    clip_low, clip_high, kl_coef, guidance,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    numbers = (guidance, kl_coef, clip_low, clip_high)
    return _loss(
        "tfk_branch_loss_gradient", _empty(velocity, *velocity.shape), velocity, velocity_old, advantages, weights,
        coef, key, noise, velocity_ref, velocity_uncond, kl_weights, numbers,
    )  # fmt: skip


def velocity_gradient(
    slopes, scale, velocity, velocity_old, coef, key, noise, velocity_ref, velocity_uncond, kl_weights, kl_coef,
    guidance,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    memory, gradient = _Memory(), _empty(velocity, *velocity.shape, dtype=velocity.dtype)
    numbers = (guidance, kl_coef, 0.0, 0.0)
    branches = memory.branches(velocity, velocity_old, noise, velocity_ref, velocity_uncond, kl_weights, numbers)
    uncond_gradient, target = _empty(velocity, 0), (None, 0)
    if velocity_uncond is not None:
        uncond_gradient = _empty(velocity, *velocity_uncond.shape, dtype=velocity_uncond.dtype)
        target = (uncond_gradient.data_ptr(), _TYPES[uncond_gradient.dtype])
    call(
        "tfk_velocity_gradient", memory.batch(velocity, coef, key, slopes.shape[1]), byref(branches),
        memory.pointer(slopes), float(scale), gradient.data_ptr(), _TYPES[gradient.dtype], *target,
    )  # fmt: skip
    return gradient, uncond_gradient
