"""The operators of the library on Triton: allocation, launch geometry, and nothing else.

BLOCK and WARPS fix the order of additions; they are chosen once for all shapes so that results never depend on a
heuristic. Inputs that are not contiguous are copied first, because noise is numbered in the order of elements.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
from torch import Tensor

from ..plain.gradients import loss_then_gradient
from ..plain.reference import Branches
from . import loss as loss_kernels
from . import noise as noise_kernels
from . import transition as step_kernels
from .noise import LAUNCH

BLOCK = 1024
LANES = 256
OPTIONS = {"num_warps": 4, **LAUNCH}


def _flat(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """Contiguous memory of a tensor; a tensor that is not given needs a pointer that is never read."""
    return stand_in if tensor is None else tensor.contiguous()


def _geometry(tensor: Tensor) -> tuple[int, int, int]:
    """rows, elements per row, blocks per row."""
    rows = tensor.shape[0]
    elements = tensor.numel() // rows
    return rows, elements, triton.cdiv(elements, BLOCK)


def _fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32).contiguous()


def _device(tensor: Tensor):
    """The device of the launch: kernels run where their data is, not on the current device."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)


def normal(key: Tensor, siblings: int, elements: int) -> Tensor:
    rows, blocks = key.shape[0], triton.cdiv(elements, BLOCK)
    noise = torch.empty(rows, siblings, elements, dtype=torch.float32, device=key.device)
    with _device(key):
        noise_kernels.normal_kernel[(rows * siblings * blocks,)](
            key.contiguous(), noise, siblings, elements, blocks, BLOCK=BLOCK, **OPTIONS
        )
    return noise


def transition_step(latents, velocity, coef, key, siblings, velocity_uncond, guidance) -> tuple[Tensor, Tensor]:
    rows, elements, blocks = _geometry(latents)
    following = torch.empty(rows, siblings, *latents.shape[1:], dtype=torch.float32, device=latents.device)
    partial = torch.empty(rows * blocks * siblings, dtype=torch.float32, device=latents.device)
    velocity, coef = velocity.contiguous(), _fp32(coef)
    with _device(latents):
        step_kernels.step_kernel[(rows * blocks,)](
            latents.contiguous(), velocity, _flat(velocity_uncond, velocity), coef, key.contiguous(), following,
            partial, siblings, elements, blocks,
            GUIDED=velocity_uncond is not None, GUIDANCE=float(guidance), BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip
        return following, _finish_log_prob(partial, coef, rows, siblings, elements, blocks)


def _finish_log_prob(partial: Tensor, coef: Tensor, rows: int, siblings: int, elements: int, blocks: int) -> Tensor:
    log_prob = torch.empty(rows, siblings, dtype=torch.float32, device=partial.device)
    step_kernels.log_prob_finish_kernel[(rows * siblings,)](
        partial, coef, log_prob, siblings, elements, blocks, LANES=LANES, **OPTIONS
    )
    return log_prob


def transition_log_prob(next_latents, latents, velocity, coef) -> Tensor:
    rows, elements, blocks = _geometry(latents)
    siblings = next_latents.shape[1]
    partial = torch.empty(rows * blocks * siblings, dtype=torch.float32, device=latents.device)
    coef = _fp32(coef)
    with _device(latents):
        step_kernels.log_prob_kernel[(rows * blocks,)](
            next_latents.contiguous(), latents.contiguous(), velocity.contiguous(), coef, partial, siblings, elements,
            blocks, BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip
        return _finish_log_prob(partial, coef, rows, siblings, elements, blocks)


def transition_log_prob_gradient(slopes, next_latents, latents, velocity, coef) -> Tensor:
    rows, elements, blocks = _geometry(latents)
    gradient = torch.empty(velocity.shape, dtype=velocity.dtype, device=velocity.device)
    with _device(latents):
        step_kernels.log_prob_gradient_kernel[(rows * blocks,)](
            _fp32(slopes), next_latents.contiguous(), latents.contiguous(), velocity.contiguous(), _fp32(coef),
            gradient, next_latents.shape[1], elements, blocks, BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip
    return gradient


def _log_ratios(branches: Branches, siblings: int) -> tuple[Tensor, Tensor]:
    """Pass 1 and its finish: log-ratios (R, K) and the partial sums, for the KL. Of contiguous branches."""
    velocity, velocity_old, terms, key, noise, velocity_ref, _ = branches
    rows, elements, blocks = _geometry(velocity)
    partial = torch.empty(rows * blocks * (siblings + 2), dtype=torch.float32, device=velocity.device)
    log_ratios = torch.empty(rows, siblings, dtype=torch.float32, device=velocity.device)
    loss_kernels.moments_kernel[(rows * blocks,)](
        velocity, velocity_old, _flat(velocity_ref, velocity), terms, _flat(key, partial), _flat(noise, velocity),
        partial, siblings, elements, blocks,
        REFERENCE=velocity_ref is not None, STORED=noise is not None, BLOCK=BLOCK, **OPTIONS,
    )  # fmt: skip
    loss_kernels.log_ratio_kernel[(rows * siblings,)](
        partial, terms, log_ratios, siblings, elements, blocks, LANES=LANES, **OPTIONS
    )
    return log_ratios, partial


def _contiguous(branches: Branches) -> Branches:
    *tensors, kl_coef = branches._replace(terms=_fp32(branches.terms))
    return Branches(*(None if tensor is None else tensor.contiguous() for tensor in tensors), float(kl_coef))


def log_ratio(branches: Branches, siblings: int) -> Tensor:
    with _device(branches.velocity):
        return _log_ratios(_contiguous(branches), siblings)[0]


def _reference_kl(partial: Tensor, branches: Branches, siblings: int) -> Tensor:
    rows, elements, blocks = _geometry(branches.velocity)
    kl = torch.empty(rows, dtype=torch.float32, device=partial.device)
    loss_kernels.reference_kl_kernel[(rows,)](
        partial, branches.terms, kl, siblings, elements, blocks, LANES=LANES, **OPTIONS
    )
    return kl


def branch_loss(
    branches: Branches, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor, Tensor]:
    branches, advantages = _contiguous(branches), _fp32(advantages)
    rows, siblings = advantages.shape
    loss, stats, slopes = (advantages.new_empty(shape) for shape in ((), 7, (rows, siblings)))
    has_reference = branches.velocity_ref is not None
    with _device(advantages):
        log_ratios, partial = _log_ratios(branches, siblings)
        kl = _reference_kl(partial, branches, siblings) if has_reference else partial
        loss_kernels.objective_kernel[(1,)](
            log_ratios, kl, advantages, branches.terms, loss, stats, slopes, rows, siblings,
            LOW=float(clip_low), HIGH=float(clip_high), KL_COEF=branches.kl_coef, REFERENCE=has_reference, LANES=LANES,
            **OPTIONS,
        )  # fmt: skip
    return loss, stats, slopes


def velocity_gradient(branches: Branches, slopes: Tensor, scale: Tensor) -> Tensor:
    branches, slopes = _contiguous(branches), _fp32(slopes)
    velocity, velocity_old, terms, key, noise, velocity_ref, kl_coef = branches
    rows, elements, blocks = _geometry(velocity)
    gradient = torch.empty(velocity.shape, dtype=velocity.dtype, device=velocity.device)
    with _device(velocity):
        loss_kernels.velocity_gradient_kernel[(rows * blocks,)](
            slopes, _fp32(scale), velocity, velocity_old, _flat(velocity_ref, velocity), terms, _flat(key, slopes),
            _flat(noise, velocity), gradient, rows, slopes.shape[1], elements, blocks,
            KL_COEF=0.0 if velocity_ref is None else kl_coef, STORED=noise is not None, BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip
    return gradient


branch_loss_gradient = partial(loss_then_gradient, branch_loss, velocity_gradient)
