"""The operators of the library on Triton: allocation, launch geometry, and nothing else.

BLOCK and WARPS fix the order of additions; they are chosen once for all shapes so that results never depend on a
heuristic. What moves work between programs without moving an addition (siblings per program) follows the size. Inputs
that are not contiguous are copied first, because noise is numbered in the order of elements.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..noise_setting import expect_noise_mode, noise_mode
from ..plain.gradients import loss_then_gradient
from ..plain.reference import Branches
from . import loss as loss_kernels
from . import noise as noise_kernels
from . import transition as step_kernels
from .fast import NOISES
from .launch import Launcher

BLOCK = 1024
LINES, LANES = 4, 64
"""Sums finished by one program, and blocks added at a time."""
ENOUGH = 1024
"""Programs that fill a large GPU (132 SMs with 8 each); with fewer, siblings are dealt out to more programs."""
RUNNER = "interpreter" if os.environ.get("TRITON_INTERPRET") == "1" else "hip" if torch.version.hip else "cuda"
PAIRS = {mode: pairs[RUNNER] for mode, pairs in NOISES.items()}
HERE = nullcontext()

draw_normals = Launcher(noise_kernels.normal_kernel)
step = Launcher(step_kernels.step_kernel)
sum_log_prob = Launcher(step_kernels.log_prob_kernel)
finish_log_prob = Launcher(step_kernels.log_prob_finish_kernel)
log_prob_gradient = Launcher(step_kernels.log_prob_gradient_kernel)
sum_moments = Launcher(loss_kernels.moments_kernel)
finish_log_ratio = Launcher(loss_kernels.log_ratio_kernel)
finish_objective = Launcher(loss_kernels.objective_kernel)
mix_gradient = Launcher(loss_kernels.velocity_gradient_kernel)


class Geometry(NamedTuple):
    """How rows are cut into programs."""

    rows: int
    elements: int
    blocks: int
    span: int
    """Siblings of one program."""
    programs: int
    """Of one row: blocks, times groups of siblings."""

    @property
    def whole(self) -> bool:
        """Whether rows are whole blocks, so that nothing needs a mask."""
        return self.elements % BLOCK == 0


@lru_cache(maxsize=256)
def geometry(rows: int, elements: int, siblings: int, block: int) -> Geometry:
    """Enough programs for the GPU, with as many siblings in each as that allows: they share what they read."""
    blocks = -(-elements // block)
    groups = min(siblings, max(1, ENOUGH // (rows * blocks)))
    span = -(-siblings // groups)
    return Geometry(rows, elements, blocks, span, blocks * -(-siblings // span))


def _geometry(tensor: Tensor, siblings: int) -> Geometry:
    rows = tensor.shape[0]
    return geometry(rows, tensor.numel() // rows, siblings, BLOCK)


def _fp32(tensor: Tensor) -> Tensor:
    return (tensor if tensor.dtype is torch.float32 else tensor.float()).contiguous()


def _device(tensor: Tensor):
    """The device of the launch: kernels run where their data is, not on the current device."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return HERE
    return torch.cuda.device(tensor.device)


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def normal(key: Tensor, siblings: int, elements: int) -> Tensor:
    rows, blocks = key.shape[0], -(-elements // BLOCK)
    noise = _empty(key, rows, siblings, elements)
    with _device(key):
        constants = (PAIRS[noise_mode()], elements % BLOCK == 0, BLOCK)
        draw_normals(rows * siblings * blocks, (key.contiguous(), noise), (siblings, elements, blocks), constants)
    return noise


def transition_step(latents, velocity, coef, key, siblings, velocity_uncond, guidance) -> tuple[Tensor, Tensor]:
    size = _geometry(latents, siblings)
    following = _empty(latents, size.rows, siblings, *latents.shape[1:])
    sums = _empty(latents, size.rows * size.blocks * siblings)
    velocity, coef, guided = velocity.contiguous(), _fp32(coef), velocity_uncond is not None
    uncond = velocity_uncond.contiguous() if guided else velocity
    with _device(latents):
        step(
            size.rows * size.programs,
            (latents.contiguous(), velocity, uncond, coef, key.contiguous(), following, sums),
            (siblings, size.elements, size.blocks, size.span),
            (float(guidance) if guided else None, PAIRS[noise_mode()], size.whole, BLOCK),
        )
        return following, _finish_log_prob(sums, coef, size, siblings)


def _finish_log_prob(sums: Tensor, coef: Tensor, size: Geometry, siblings: int) -> Tensor:
    log_prob = _empty(sums, size.rows, siblings)
    numbers = (size.rows, siblings, size.elements, size.blocks)
    finish_log_prob(-(-size.rows * siblings // LINES), (sums, coef, log_prob), numbers, (LINES, LANES))
    return log_prob


def transition_log_prob(next_latents, latents, velocity, coef) -> Tensor:
    siblings = next_latents.shape[1]
    size = _geometry(latents, siblings)
    sums, coef = _empty(latents, size.rows * size.blocks * siblings), _fp32(coef)
    with _device(latents):
        sum_log_prob(
            size.rows * size.programs,
            (next_latents.contiguous(), latents.contiguous(), velocity.contiguous(), coef, sums),
            (siblings, size.elements, size.blocks, size.span),
            (size.whole, BLOCK),
        )
        return _finish_log_prob(sums, coef, size, siblings)


def transition_log_prob_gradient(slopes, next_latents, latents, velocity, coef) -> Tensor:
    siblings = next_latents.shape[1]
    size = _geometry(latents, siblings)
    gradient = torch.empty(velocity.shape, dtype=velocity.dtype, device=velocity.device)
    given = (_fp32(slopes), next_latents.contiguous(), latents.contiguous(), velocity.contiguous(), _fp32(coef))
    with _device(latents):
        numbers = (siblings, size.elements, size.blocks)
        log_prob_gradient(size.rows * size.blocks, (*given, gradient), numbers, (size.whole, BLOCK))
    return gradient


def _contiguous(branches: Branches) -> tuple[Tensor, ...]:
    """The tensors in contiguous memory; one that is not given needs a pointer that is never read."""
    velocity, velocity_old, terms, key, noise, velocity_ref, _ = branches
    velocity, terms = velocity.contiguous(), _fp32(terms)
    return (
        velocity, velocity_old.contiguous(), velocity if velocity_ref is None else velocity_ref.contiguous(), terms,
        terms if key is None else key.contiguous(), terms if noise is None else noise.contiguous(),
    )  # fmt: skip


def _moments(given: Branches, siblings: int, arrived: Tensor) -> tuple[Tensor, Geometry, Tensor]:
    """Pass 1: partial sums with room for R (K + 1) numbers behind them, the geometry, terms. `arrived` becomes 0."""
    tensors = _contiguous(given)
    size = _geometry(tensors[0], siblings)
    sums = _empty(arrived, size.rows * (size.blocks * (siblings + 2) + siblings + 1))
    sum_moments(
        size.rows * size.programs,
        (*tensors, sums, arrived),
        (siblings, size.elements, size.blocks, size.span),
        (given.velocity_ref is not None, given.noise is not None, PAIRS[noise_mode()], size.whole, BLOCK),
    )
    return sums, size, tensors[3]


def log_ratio(branches: Branches, siblings: int) -> Tensor:
    ratios = _empty(branches.velocity, branches.velocity.shape[0], siblings)
    with _device(ratios):
        sums, size, terms = _moments(branches, siblings, ratios)
        numbers = (size.rows, siblings, size.elements, size.blocks)
        finish_log_ratio(-(-size.rows * siblings // LINES), (sums, terms, ratios), numbers, (LINES, LANES))
    return ratios


def branch_loss(
    branches: Branches, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows, siblings = advantages.shape
    advantages = _fp32(advantages)
    loss, stats, slopes = advantages.new_empty(()), advantages.new_empty(7), torch.empty_like(advantages)
    with _device(advantages):
        sums, size, terms = _moments(branches, siblings, loss)
        finish_objective(
            -(-rows * siblings // LINES),
            (sums, advantages, terms, loss, stats, slopes),
            (rows, siblings, size.elements, size.blocks),
            (
                float(clip_low),
                float(clip_high),
                float(branches.kl_coef),
                branches.velocity_ref is not None,
                LINES,
                LANES,
            ),
        )
    return loss, stats, slopes


def velocity_gradient(given: Branches, slopes: Tensor, scale: Tensor, forward_noise: str = "") -> Tensor:
    if given.noise is None:
        expect_noise_mode(forward_noise)
    tensors = _contiguous(given)
    siblings = slopes.shape[1]
    size = _geometry(tensors[0], siblings)
    gradient = torch.empty_like(tensors[0])
    kl_coef = 0.0 if given.velocity_ref is None else float(given.kl_coef)
    with _device(gradient):
        mix_gradient(
            size.rows * size.blocks,
            (_fp32(slopes), _fp32(scale), *tensors, gradient),
            (size.rows, siblings, size.elements, size.blocks),
            (kl_coef, given.noise is not None, PAIRS[noise_mode()], size.whole, BLOCK),
        )
    return gradient


branch_loss_gradient = partial(loss_then_gradient, branch_loss, velocity_gradient)
