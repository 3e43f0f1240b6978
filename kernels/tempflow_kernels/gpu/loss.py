"""Triton kernels of the log-ratio, the branch loss and its gradient.

Pass 1 (`moments_kernel`) reads the velocities once and regenerates the K noises to form partial sums; two small
kernels finish them in a fixed order; pass 2 (`velocity_gradient_kernel`) regenerates the noises again and writes the
gradient. Nothing of the size of K latents is ever stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .noise import noise_block
from .transition import load_row, sum_blocks


@triton.jit
def moments_kernel(
    velocity, velocity_old, velocity_ref, terms, key, noise, partial, siblings, elements, blocks,
    REFERENCE: tl.constexpr, STORED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial[r, block] = sums over the block of dv^2, (v - v_ref)^2, dv noise_1 .. dv noise_K; dv = v_old - v.

    terms (R, 4): weight, square, product, kl. A row with product = 0 draws no noise.
    """
    program = tl.program_id(0).to(tl.int64)
    row, block = program // blocks, program % blocks
    index = block * BLOCK + tl.arange(0, BLOCK)
    v = load_row(velocity, row, elements, index)
    delta = load_row(velocity_old, row, elements, index) - v
    sums = partial + program * (siblings + 2)
    tl.store(sums, tl.sum(delta * delta))
    if REFERENCE:
        distance = v - load_row(velocity_ref, row, elements, index)
        tl.store(sums + 1, tl.sum(distance * distance))
    drawing = tl.load(terms + row * 4 + 2) != 0.0
    for sibling in range(siblings):
        product = 0.0
        if drawing:
            drawn = noise_block(noise, key, row, sibling, siblings, elements, block, BLOCK, STORED)
            product = tl.sum(delta * drawn)
        tl.store(sums + 2 + sibling, product)


@triton.jit
def log_ratio_kernel(partial, terms, log_ratio, siblings, elements, blocks, LANES: tl.constexpr):
    """log_ratio[r, j] = -(square mean(dv^2) + product mean(dv noise_j))."""
    program = tl.program_id(0).to(tl.int64)
    row, sibling = program // siblings, program % siblings
    count = elements * 1.0
    square = tl.load(terms + row * 4 + 1) * (sum_blocks(partial, row, 0, siblings + 2, blocks, LANES) / count)
    sums = sum_blocks(partial, row, 2 + sibling, siblings + 2, blocks, LANES)
    tl.store(log_ratio + program, -(square + tl.load(terms + row * 4 + 2) * (sums / count)))


@triton.jit
def reference_kl_kernel(partial, terms, kl, siblings, elements, blocks, LANES: tl.constexpr):
    """kl[r] = terms[r, 3] * mean((v - v_ref)^2)."""
    row = tl.program_id(0).to(tl.int64)
    square = sum_blocks(partial, row, 1, siblings + 2, blocks, LANES) / (elements * 1.0)
    tl.store(kl + row, tl.load(terms + row * 4 + 3) * square)


@triton.jit
def expm1_parts(x):
    """`exp(x) - 1` and `exp(x) - 1 - x`: polynomials below |x| = 1/2, so that neither cancels."""
    p = tl.fma(x, 2.4955437766038813e-05, 0.00019841661560349166)
    p = tl.fma(x, p, 0.001388860517181456)
    p = tl.fma(x, p, 0.00833333283662796)
    p = tl.fma(x, p, 0.0416666679084301)
    p = tl.fma(x, p, 0.1666666716337204)
    p = tl.fma(x, p, 0.5)
    tail = x * x * p
    small = tl.abs(x) < 0.5
    far = tl.exp(x) - 1.0
    return tl.where(small, x + tail, far), tl.where(small, tail, far - x)


@triton.jit
def greater(a, b):
    """Maximum that passes NaN on."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def objective_kernel(
    log_ratio, kl, advantages, terms, loss, stats, slopes, rows, siblings,
    LOW: tl.constexpr, HIGH: tl.constexpr, KL_COEF: tl.constexpr, REFERENCE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program: loss, statistics and d loss / d log_ratio from all R x K log-ratios, LANES at a time in order.

    loss = mean(max(-g r, -g clip(r, 1 - LOW, 1 + HIGH))) + KL_COEF mean(kl), g = weight advantage, r = exp(log_ratio).
    """
    lane = tl.arange(0, LANES)
    zero = tl.zeros([LANES], tl.float32)
    surrogate, excess_sum, outside_sum, approx, magnitude_sum = zero, zero, zero, zero, zero
    excess_max, magnitude_max = zero - float("inf"), zero
    count = rows * siblings
    for first in range(0, count, LANES):
        index = first + lane
        inside = index < count
        x = tl.load(log_ratio + index, mask=inside, other=0.0)
        gain = tl.load(advantages + index, mask=inside, other=0.0)
        gain *= tl.load(terms + index // siblings * 4, mask=inside, other=0.0)
        excess, rest = expm1_parts(x)
        free, clipped = -gain * excess, -gain * tl.minimum(tl.maximum(excess, -LOW), HIGH)
        active = free >= clipped
        tl.store(slopes + index, tl.where(active, -gain * (1.0 + excess), 0.0) / (count * 1.0), mask=inside)
        surrogate += tl.where((free < clipped), clipped, free) - gain
        outside_sum += tl.where((excess < -LOW) | (excess > HIGH), 1.0, 0.0)
        excess_sum += excess
        approx += rest
        magnitude_sum += tl.abs(x)
        excess_max = greater(excess_max, tl.where(inside, excess, -float("inf")))
        magnitude_max = greater(magnitude_max, tl.abs(x))
    kl_mean = 0.0
    if REFERENCE:
        kl_mean = sum_blocks(kl, 0, 0, 1, rows, LANES) / (rows * 1.0)
    share = 1.0 / (count * 1.0)
    tl.store(loss, tl.sum(surrogate) * share + KL_COEF * kl_mean)
    tl.store(stats, 1.0 + tl.sum(excess_sum) * share)
    tl.store(stats + 1, 1.0 + tl.reduce(excess_max, 0, greater))
    tl.store(stats + 2, tl.sum(outside_sum) * share)
    tl.store(stats + 3, tl.sum(approx) * share)
    tl.store(stats + 4, kl_mean)
    tl.store(stats + 5, tl.sum(magnitude_sum) * share)
    tl.store(stats + 6, tl.reduce(magnitude_max, 0, greater))


@triton.jit
def velocity_gradient_kernel(
    slopes, scale, velocity, velocity_old, velocity_ref, terms, key, noise, gradient, rows, siblings, elements, blocks,
    KL_COEF: tl.constexpr, STORED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """gradient = scale / d * (2 square (sum_j g_j) dv + product sum_j g_j noise_j + 2 KL_COEF kl (v - v_ref) / R).

    square, product and kl from terms (R, 4), dv = v_old - v, g = slopes.
    """
    program = tl.program_id(0).to(tl.int64)
    row, block = program // blocks, program % blocks
    index = block * BLOCK + tl.arange(0, BLOCK)
    v = load_row(velocity, row, elements, index)
    delta = load_row(velocity_old, row, elements, index) - v
    square, product = tl.load(terms + row * 4 + 1), tl.load(terms + row * 4 + 2)
    slope_sum = 0.0
    mixed = tl.zeros([BLOCK], tl.float32)
    for sibling in range(siblings):
        slope = tl.load(slopes + row * siblings + sibling)
        slope_sum += slope
        if product != 0.0:
            mixed += slope * noise_block(noise, key, row, sibling, siblings, elements, block, BLOCK, STORED)
    total = 2.0 * square * slope_sum * delta + product * mixed
    if KL_COEF != 0.0:
        share = 2.0 * KL_COEF * tl.load(terms + row * 4 + 3) / (rows * 1.0)
        total += share * (v - load_row(velocity_ref, row, elements, index))
    total *= tl.load(scale) / (elements * 1.0)
    target = gradient + row * elements + index
    tl.store(target, total.to(gradient.dtype.element_ty), mask=index < elements)
