"""Triton kernels of the sampler step and of its log-density.

Reductions run in two passes with a fixed order: a partial sum per (row, sibling, block), then one program per row and
sibling. BLOCK and the number of warps decide the order of additions, so both are part of the numeric contract. How many
siblings one program handles (`span`) is not: it moves work between programs and no addition.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .noise import apart, four_normals, inside_row, tile_places, together


@triton.jit
def load_tile(data, start, inside, BLOCK: tl.constexpr):
    """The block of `data` that begins at element `start`, as a (BLOCK / 4, 4) tile of fp32; 0 where not inside."""
    return tl.load(data + start + tile_places(BLOCK), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def locate(blocks, siblings, span):
    """row, block, first sibling and the one after the last of this program; programs of a block lie side by side."""
    program = tl.program_id(0)
    groups = (siblings + span - 1) // span
    draw, first = program // groups, program % groups * span
    return (draw // blocks).to(tl.int64), draw % blocks, first, tl.minimum(first + span, siblings)


@triton.jit
def step_mean(latents, velocity, uncond, coef, row, start, inside, GUIDANCE: tl.constexpr, BLOCK: tl.constexpr):
    """`x_coef x + v_coef v` of a block; v is `uncond + GUIDANCE (velocity - uncond)` where there is a GUIDANCE."""
    x = load_tile(latents, start, inside, BLOCK)
    v = load_tile(velocity, start, inside, BLOCK)
    if GUIDANCE is not None:
        base = load_tile(uncond, start, inside, BLOCK)
        v = base + GUIDANCE * (v - base)
    return tl.load(coef + row * 3) * x + tl.load(coef + row * 3 + 1) * v


@triton.jit
def step_kernel(
    latents, velocity, uncond, coef, key, next_latents, partial, siblings, elements, blocks, span,
    GUIDANCE: tl.constexpr, PAIR: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """next[r, j] = x_coef x + v_coef v + std noise_j; partial[r, j, block] = sum of noise_j^2 over the block."""
    row, block, first, last = locate(blocks, siblings, span)
    QUADS: tl.constexpr = BLOCK // 4
    inside = inside_row(elements, block, BLOCK, WHOLE)
    block_start = tl.cast(block, tl.int64) * BLOCK
    start = row * elements + block_start
    mean = step_mean(latents, velocity, uncond, coef, row, start, inside, GUIDANCE, BLOCK)
    std, draw = tl.load(coef + row * 3 + 2), row * siblings + first
    target, sums = next_latents + (draw * elements + block_start), partial + (draw * blocks + block)
    seed, quads = tl.load(key + row * 2), tl.cast((elements + 3) // 4, tl.int64)  # K d / 4 may pass 2**31
    counter = tl.load(key + row * 2 + 1) + first * quads + tl.cast(block, tl.int64) * QUADS
    if std == 0.0:
        for _ in range(first, last):
            tl.store(target + tile_places(BLOCK), mean, mask=inside)
            target += elements
    else:
        i0, i1, i2, i3 = apart(inside, QUADS)
        for _ in range(first, last):
            n0, n1, n2, n3 = four_normals(seed, counter, QUADS, PAIR)
            tl.store(target + tile_places(BLOCK), mean + std * together(n0, n1, n2, n3, QUADS), mask=inside)
            n0, n1 = tl.where(i0, n0, 0.0), tl.where(i1, n1, 0.0)
            n2, n3 = tl.where(i2, n2, 0.0), tl.where(i3, n3, 0.0)
            tl.store(sums, tl.sum(tl.fma(n3, n3, tl.fma(n2, n2, tl.fma(n1, n1, n0 * n0)))))
            counter += quads
            target += elements
            sums += blocks


@triton.jit
def log_prob_kernel(
    next_latents, latents, velocity, coef, partial, siblings, elements, blocks, span,
    WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial[r, j, block] = sum over the block of ((next_j - mean) / std)^2."""
    row, block, first, last = locate(blocks, siblings, span)
    inside = inside_row(elements, block, BLOCK, WHOLE)
    block_start = tl.cast(block, tl.int64) * BLOCK
    start = row * elements + block_start
    mean = step_mean(latents, velocity, velocity, coef, row, start, inside, None, BLOCK)
    std, draw = tl.load(coef + row * 3 + 2), row * siblings + first
    inverse = 1.0 / tl.where(std == 0.0, 1.0, std)
    start, sums = draw * elements + block_start, partial + (draw * blocks + block)
    for _ in range(first, last):
        standardised = (load_tile(next_latents, start, inside, BLOCK) - mean) * inverse
        tl.store(sums, tl.sum(standardised * standardised))
        start += elements
        sums += blocks


@triton.jit
def sum_blocks(partial, line, inside, blocks, LANES: tl.constexpr):
    """Sums over blocks of the lines of partial (lines, blocks), LANES blocks at a time in a fixed order.

    Args:
        line: vector int64. inside: which of its lines are there; the others give 0.
    """
    lane = tl.arange(0, LANES)
    total = tl.zeros([line.shape[0], LANES], tl.float32)
    for first in range(0, blocks, LANES):
        block = first + lane
        here = inside[:, None] & (block < blocks)[None, :]
        total += tl.load(partial + line[:, None] * blocks + block[None, :].to(tl.int64), mask=here, other=0.0)
    return tl.sum(total, axis=1)


@triton.jit
def log_prob_finish_kernel(
    partial, coef, log_prob, rows, siblings, elements, blocks, LINES: tl.constexpr, LANES: tl.constexpr
):
    """log_prob[r, j] = -mean square / 2 - log std - log(2 pi) / 2; 0 where std = 0, NaN where std < 0."""
    draw = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    inside = draw < tl.cast(rows, tl.int64) * siblings
    std = tl.load(coef + draw // siblings * 3 + 2, mask=inside, other=0.0)
    square = sum_blocks(partial, draw, inside & (std != 0.0), blocks, LANES) / (elements * 1.0)
    value = -0.5 * square - tl.log(tl.where(std == 0.0, 1.0, std)) - 0.9189385332046727
    tl.store(log_prob + draw, tl.where(std == 0.0, 0.0, value), mask=inside)


@triton.jit
def log_prob_gradient_kernel(
    slopes, next_latents, latents, velocity, coef, gradient, siblings, elements, blocks,
    WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """gradient[r] = v_coef / (std^2 d) * sum_j slope_j (next_j - mean); 0 where std = 0."""
    row, block, first, last = locate(blocks, siblings, siblings)
    inside = inside_row(elements, block, BLOCK, WHOLE)
    block_start = tl.cast(block, tl.int64) * BLOCK
    start = row * elements + block_start
    mean = step_mean(latents, velocity, velocity, coef, row, start, inside, None, BLOCK)
    v_coef, std = tl.load(coef + row * 3 + 1), tl.load(coef + row * 3 + 2)
    divisor = tl.where(std == 0.0, 1.0, std)
    scale = tl.where(std == 0.0, 0.0, v_coef / divisor / divisor / (elements * 1.0))
    total = tl.zeros([BLOCK // 4, 4], tl.float32)
    follower, slope = row * siblings * elements + block_start, slopes + row * siblings
    for _ in range(first, last):
        total += tl.load(slope) * (load_tile(next_latents, follower, inside, BLOCK) - mean)
        follower += elements
        slope += 1
    target = gradient + start + tile_places(BLOCK)
    tl.store(target, (scale * total).to(gradient.dtype.element_ty), mask=inside)
