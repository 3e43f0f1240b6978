"""The operators of the library on the C++ twin: contiguous memory, pointers, torch's thread count."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plain.reference import Branches
from .library import Array, Batch, byref, call
from .library import Branches as CBranches

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

    def branches(self, branches: Branches, siblings: int) -> tuple[Batch, CBranches]:
        velocity, velocity_old, terms, key, noise, velocity_ref, kl_coef = branches
        arrays = (self.array(tensor) for tensor in (velocity, velocity_old, velocity_ref, noise))
        return self.batch(velocity, None, key, siblings), CBranches(*arrays, self.pointer(terms), float(kl_coef))


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


def log_ratio(branches: Branches, siblings: int) -> Tensor:
    memory, ratios = _Memory(), _empty(branches.velocity, branches.velocity.shape[0], siblings)
    batch, given = memory.branches(branches, siblings)
    call("tfk_log_ratio", batch, byref(given), ratios.data_ptr())
    return ratios


def _loss(function: str, result: Tensor, branches: Branches, advantages: Tensor, clip_low: float, clip_high: float):
    """loss, statistics and `result`, which is the slopes or the gradient."""
    memory, loss, stats = _Memory(), _empty(advantages), _empty(advantages, 7)
    batch, given = memory.branches(branches, advantages.shape[1])
    call(
        function, batch, byref(given), memory.pointer(advantages), float(clip_low), float(clip_high), loss.data_ptr(),
        stats.data_ptr(), result.data_ptr(),
    )  # fmt: skip
    return loss, stats, result


def branch_loss(branches: Branches, advantages: Tensor, *clip_range: float) -> tuple[Tensor, Tensor, Tensor]:
    slopes = _empty(advantages, *advantages.shape)
    return _loss("tfk_branch_loss", slopes, branches, advantages, *clip_range)


def branch_loss_gradient(branches: Branches, advantages: Tensor, *clip_range: float) -> tuple[Tensor, Tensor, Tensor]:
    gradient = _empty(advantages, *branches.velocity.shape)
    return _loss("tfk_branch_loss_gradient", gradient, branches, advantages, *clip_range)


def velocity_gradient(branches: Branches, slopes: Tensor, scale: Tensor, forward_noise: str = "") -> Tensor:
    """`forward_noise` does not matter: the normals are always exact."""
    velocity, memory = branches.velocity, _Memory()
    gradient = _empty(velocity, *velocity.shape, dtype=velocity.dtype)
    batch, given = memory.branches(branches, slopes.shape[1])
    call(
        "tfk_velocity_gradient", batch, byref(given), memory.pointer(slopes), float(scale), gradient.data_ptr(),
        _TYPES[gradient.dtype],
    )  # fmt: skip
    return gradient
