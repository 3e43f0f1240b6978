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
from .noise import LAUNCH

BLOCK = 1024
LINES, LANES = 4, 64
"""Sums finished by one program, and blocks added at a time."""
OPTIONS = {"num_warps": 4, **LAUNCH}
ENOUGH = 1024
"""Programs that fill a large GPU (132 SMs with 8 each); with fewer, siblings are dealt out to more programs."""
RUNNER = "interpreter" if os.environ.get("TRITON_INTERPRET") == "1" else "hip" if torch.version.hip else "cuda"
PAIRS = {mode: pairs[RUNNER] for mode, pairs in NOISES.items()}
HERE = nullcontext()


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
    return tensor.to(torch.float32).contiguous()


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
        noise_kernels.normal_kernel[(rows * siblings * blocks,)](
            key.contiguous(), noise, siblings, elements, blocks,
            PAIR=PAIRS[noise_mode()], WHOLE=elements % BLOCK == 0, BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip
    return noise


def transition_step(latents, velocity, coef, key, siblings, velocity_uncond, guidance) -> tuple[Tensor, Tensor]:
    size = _geometry(latents, siblings)
    following = _empty(latents, size.rows, siblings, *latents.shape[1:])
    sums = _empty(latents, size.rows * size.blocks * siblings)
    velocity, coef, guided = velocity.contiguous(), _fp32(coef), velocity_uncond is not None
    with _device(latents):
        step_kernels.step_kernel[(size.rows * size.programs,)](
            latents.contiguous(), velocity, velocity_uncond.contiguous() if guided else velocity, coef,
            key.contiguous(), following, sums, siblings, size.elements, size.blocks, size.span,
            GUIDANCE=float(guidance) if guided else None, PAIR=PAIRS[noise_mode()], WHOLE=size.whole, BLOCK=BLOCK,
            **OPTIONS,
        )  # fmt: skip
        return following, _finish_log_prob(sums, coef, size, siblings)


def _finish_log_prob(sums: Tensor, coef: Tensor, size: Geometry, siblings: int) -> Tensor:
    log_prob = _empty(sums, size.rows, siblings)
    step_kernels.log_prob_finish_kernel[(-(-size.rows * siblings // LINES),)](
        sums, coef, log_prob, size.rows, siblings, size.elements, size.blocks, LINES=LINES, LANES=LANES, **OPTIONS
    )
    return log_prob


def transition_log_prob(next_latents, latents, velocity, coef) -> Tensor:
    siblings = next_latents.shape[1]
    size = _geometry(latents, siblings)
    sums, coef = _empty(latents, size.rows * size.blocks * siblings), _fp32(coef)
    with _device(latents):
        step_kernels.log_prob_kernel[(size.rows * size.programs,)](
            next_latents.contiguous(), latents.contiguous(), velocity.contiguous(), coef, sums, siblings,
            size.elements, size.blocks, size.span, WHOLE=size.whole, BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip
        return _finish_log_prob(sums, coef, size, siblings)


def transition_log_prob_gradient(slopes, next_latents, latents, velocity, coef) -> Tensor:
    siblings = next_latents.shape[1]
    size = _geometry(latents, siblings)
    gradient = torch.empty(velocity.shape, dtype=velocity.dtype, device=velocity.device)
    with _device(latents):
        step_kernels.log_prob_gradient_kernel[(size.rows * size.blocks,)](
            _fp32(slopes), next_latents.contiguous(), latents.contiguous(), velocity.contiguous(), _fp32(coef),
            gradient, siblings, size.elements, size.blocks, WHOLE=size.whole, BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip
    return gradient


def _contiguous(branches: Branches) -> Branches:
    """Contiguous memory; a tensor that is not given needs a pointer that is never read."""
    velocity, velocity_old, terms, key, noise, velocity_ref, kl_coef = branches
    velocity, terms = velocity.contiguous(), _fp32(terms)
    return Branches(
        velocity, velocity_old.contiguous(), terms, terms if key is None else key.contiguous(),
        terms if noise is None else noise.contiguous(), velocity if velocity_ref is None else velocity_ref.contiguous(),
        float(kl_coef),
    )  # fmt: skip


def _moments(given: Branches, siblings: int, arrived: Tensor) -> tuple[Tensor, Geometry, Tensor]:
    """Pass 1: partial sums with room for R (K + 1) numbers behind them, the geometry, terms. `arrived` becomes 0."""
    velocity, velocity_old, terms, key, noise, velocity_ref, _ = _contiguous(given)
    size = _geometry(velocity, siblings)
    sums = _empty(velocity, size.rows * (size.blocks * (siblings + 2) + siblings + 1))
    loss_kernels.moments_kernel[(size.rows * size.programs,)](
        velocity, velocity_old, velocity_ref, terms, key, noise, sums, arrived, siblings, size.elements, size.blocks,
        size.span,
        REFERENCE=given.velocity_ref is not None, STORED=given.noise is not None, PAIR=PAIRS[noise_mode()],
        WHOLE=size.whole, BLOCK=BLOCK, **OPTIONS,
    )  # fmt: skip
    return sums, size, terms


def log_ratio(branches: Branches, siblings: int) -> Tensor:
    ratios = _empty(branches.velocity, branches.velocity.shape[0], siblings)
    with _device(ratios):
        sums, size, terms = _moments(branches, siblings, ratios)
        loss_kernels.log_ratio_kernel[(-(-ratios.numel() // LINES),)](
            sums, terms, ratios, size.rows, siblings, size.elements, size.blocks, LINES=LINES, LANES=LANES, **OPTIONS
        )
    return ratios


def branch_loss(
    branches: Branches, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor, Tensor]:
    siblings = advantages.shape[1]
    loss, stats, slopes = _empty(advantages), _empty(advantages, 7), _empty(advantages, *advantages.shape)
    with _device(advantages):
        sums, size, terms = _moments(branches, siblings, loss)
        loss_kernels.objective_kernel[(-(-slopes.numel() // LINES),)](
            sums, _fp32(advantages), terms, loss, stats, slopes, size.rows, siblings, size.elements, size.blocks,
            LOW=float(clip_low), HIGH=float(clip_high), KL_COEF=float(branches.kl_coef),
            REFERENCE=branches.velocity_ref is not None, LINES=LINES, LANES=LANES, **OPTIONS,
        )  # fmt: skip
    return loss, stats, slopes


def velocity_gradient(given: Branches, slopes: Tensor, scale: Tensor, forward_noise: str = "") -> Tensor:
    if given.noise is None:
        expect_noise_mode(forward_noise)
    velocity, velocity_old, terms, key, noise, velocity_ref, kl_coef = _contiguous(given)
    siblings = slopes.shape[1]
    size = _geometry(velocity, siblings)
    gradient = torch.empty(velocity.shape, dtype=velocity.dtype, device=velocity.device)
    with _device(velocity):
        loss_kernels.velocity_gradient_kernel[(size.rows * size.blocks,)](
            _fp32(slopes), _fp32(scale), velocity, velocity_old, velocity_ref, terms, key, noise, gradient, size.rows,
            siblings, size.elements, size.blocks,
            KL_COEF=0.0 if given.velocity_ref is None else kl_coef, STORED=given.noise is not None,
            PAIR=PAIRS[noise_mode()], WHOLE=size.whole, BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip
    return gradient


branch_loss_gradient = partial(loss_then_gradient, branch_loss, velocity_gradient)
