"""Triton kernels of the sampler step and of its log-density.

Reductions run in two passes with a fixed order: a partial sum per (row, block, sibling), then one program per row and
sibling. BLOCK and the number of warps decide the order of additions, so both are part of the numeric contract.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .noise import noise_block


@triton.jit
def load_row(data, row, elements, index):
    """Elements `index` of row `row` of a contiguous (R, elements) array, as fp32; 0 beyond the end."""
    return tl.load(data + row * elements + index, mask=index < elements, other=0.0).to(tl.float32)


@triton.jit
def load_guided(velocity, uncond, row, elements, index, GUIDED: tl.constexpr, GUIDANCE: tl.constexpr):
    """`uncond + guidance (velocity - uncond)`, or `velocity`."""
    value = load_row(velocity, row, elements, index)
    if GUIDED:
        base = load_row(uncond, row, elements, index)
        value = base + GUIDANCE * (value - base)
    return value


@triton.jit
def step_kernel(
    latents, velocity, uncond, coef, key, next_latents, partial, siblings, elements, blocks,
    GUIDED: tl.constexpr, GUIDANCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """next[r, j] = x_coef x + v_coef v + std noise_j; partial[r, block, j] = sum of noise_j^2 over the block."""
    program = tl.program_id(0).to(tl.int64)
    row, block = program // blocks, program % blocks
    index = block * BLOCK + tl.arange(0, BLOCK)
    inside = index < elements
    x_coef, v_coef, std = tl.load(coef + row * 3), tl.load(coef + row * 3 + 1), tl.load(coef + row * 3 + 2)
    v = load_guided(velocity, uncond, row, elements, index, GUIDED, GUIDANCE)
    mean = x_coef * load_row(latents, row, elements, index) + v_coef * v
    for sibling in range(siblings):
        noise = tl.zeros([BLOCK], tl.float32)
        if std != 0.0:
            noise = noise_block(key, key, row, sibling, siblings, elements, block, BLOCK, False)
        start = next_latents + (row * siblings + sibling) * elements
        tl.store(start + index, mean + std * noise, mask=inside)
        tl.store(partial + program * siblings + sibling, tl.sum(tl.where(inside, noise * noise, 0.0)))


@triton.jit
def log_prob_kernel(next_latents, latents, velocity, coef, partial, siblings, elements, blocks, BLOCK: tl.constexpr):
    """partial[r, block, j] = sum over the block of ((next_j - mean) / std)^2."""
    program = tl.program_id(0).to(tl.int64)
    row, block = program // blocks, program % blocks
    index = block * BLOCK + tl.arange(0, BLOCK)
    x_coef, v_coef, std = tl.load(coef + row * 3), tl.load(coef + row * 3 + 1), tl.load(coef + row * 3 + 2)
    mean = x_coef * load_row(latents, row, elements, index) + v_coef * load_row(velocity, row, elements, index)
    divisor = tl.where(std == 0.0, 1.0, std)
    for sibling in range(siblings):
        residual = load_row(next_latents, row * siblings + sibling, elements, index) - mean
        standardised = tl.div_rn(residual, divisor + tl.zeros_like(residual))
        square = tl.where(index < elements, standardised * standardised, 0.0)
        tl.store(partial + program * siblings + sibling, tl.sum(square))


@triton.jit
def sum_blocks(partial, row, column, columns, blocks, LANES: tl.constexpr):
    """Sum over blocks of partial[row, block, column], LANES blocks at a time in a fixed order."""
    lane = tl.arange(0, LANES)
    total = tl.zeros([LANES], tl.float32)
    for first in range(0, blocks, LANES):
        block = first + lane
        index = (row * blocks + block) * columns + column
        total += tl.load(partial + index, mask=block < blocks, other=0.0)
    return tl.sum(total)


@triton.jit
def log_prob_finish_kernel(partial, coef, log_prob, siblings, elements, blocks, LANES: tl.constexpr):
    """log_prob[r, j] = -mean square / 2 - log std - log(2 pi) / 2; 0 where std = 0, NaN where std < 0."""
    program = tl.program_id(0).to(tl.int64)
    row, sibling = program // siblings, program % siblings
    std = tl.load(coef + row * 3 + 2)
    square = sum_blocks(partial, row, sibling, siblings, blocks, LANES) / (elements * 1.0)
    value = -0.5 * square - tl.log(tl.where(std == 0.0, 1.0, std)) - 0.9189385332046727
    tl.store(log_prob + program, tl.where(std == 0.0, 0.0, value))


@triton.jit
def log_prob_gradient_kernel(
    slopes, next_latents, latents, velocity, coef, gradient, siblings, elements, blocks, BLOCK: tl.constexpr
):
    """gradient[r] = v_coef / (std^2 d) * sum_j slope_j (next_j - mean); 0 where std = 0."""
    program = tl.program_id(0).to(tl.int64)
    row, block = program // blocks, program % blocks
    index = block * BLOCK + tl.arange(0, BLOCK)
    x_coef, v_coef, std = tl.load(coef + row * 3), tl.load(coef + row * 3 + 1), tl.load(coef + row * 3 + 2)
    mean = x_coef * load_row(latents, row, elements, index) + v_coef * load_row(velocity, row, elements, index)
    divisor = tl.where(std == 0.0, 1.0, std)
    scale = tl.where(std == 0.0, 0.0, v_coef / divisor / divisor / (elements * 1.0))
    total = tl.zeros([BLOCK], tl.float32)
    for sibling in range(siblings):
        slope = tl.load(slopes + row * siblings + sibling)
        total += slope * (load_row(next_latents, row * siblings + sibling, elements, index) - mean)
    target = gradient + row * elements + index
    tl.store(target, (scale * total).to(gradient.dtype.element_ty), mask=index < elements)
