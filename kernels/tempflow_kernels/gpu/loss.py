"""Triton kernels of the log-ratio, the branch loss and its gradient.

Pass 1 (`moments_kernel`) reads the velocities once and regenerates the K noises to form partial sums; two small
kernels finish them in a fixed order; pass 2 (`velocity_gradient_kernel`) regenerates the noises again and writes the
gradient of both guidance halves. Nothing of the size of K latents is ever stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .noise import noise_block
from .transition import load_guided, load_row, sum_blocks


@triton.jit
def moments_kernel(
    velocity, velocity_old, velocity_ref, uncond, coef, key, noise, partial, siblings, elements, blocks,
    GUIDED: tl.constexpr, GUIDANCE: tl.constexpr, REFERENCE: tl.constexpr, STORED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial[r, block] = sums over the block of delta^2, (v - v_ref)^2, delta noise_1 .. delta noise_K."""
    program = tl.program_id(0).to(tl.int64)
    row, block = program // blocks, program % blocks
    index = block * BLOCK + tl.arange(0, BLOCK)
    v = load_guided(velocity, uncond, row, elements, index, GUIDED, GUIDANCE)
    delta = load_row(velocity_old, row, elements, index) - v
    sums = partial + program * (siblings + 2)
    tl.store(sums, tl.sum(delta * delta))
    if REFERENCE:
        distance = v - load_row(velocity_ref, row, elements, index)
        tl.store(sums + 1, tl.sum(distance * distance))
    stochastic = tl.load(coef + row * 3 + 2) != 0.0
    for sibling in range(siblings):
        product = 0.0
        if stochastic:
            drawn = noise_block(noise, key, row, sibling, siblings, elements, block, BLOCK, STORED)
            product = tl.sum(delta * drawn)
        tl.store(sums + 2 + sibling, product)


@triton.jit
def sensitivity(coef, row):
    """v_coef / std of a row, 0 where std = 0, NaN where std < 0."""
    v_coef, std = tl.load(coef + row * 3 + 1), tl.load(coef + row * 3 + 2)
    value = tl.where(std == 0.0, 0.0, v_coef / tl.where(std == 0.0, 1.0, std))
    return tl.where(std < 0.0, float("nan"), value)


@triton.jit
def log_ratio_kernel(partial, coef, log_ratio, siblings, elements, blocks, LANES: tl.constexpr):
    """log_ratio[r, j] = -(s^2 mean(delta^2) / 2 + s mean(delta noise_j)) with s = v_coef / std."""
    program = tl.program_id(0).to(tl.int64)
    row, sibling = program // siblings, program % siblings
    count = elements * 1.0
    square = sum_blocks(partial, row, 0, siblings + 2, blocks, LANES) / count
    product = sum_blocks(partial, row, 2 + sibling, siblings + 2, blocks, LANES) / count
    s = sensitivity(coef, row)
    tl.store(log_ratio + program, -(0.5 * s * s * square + s * product))


@triton.jit
def reference_kl_kernel(
    partial, coef, kl_weights, kl, siblings, elements, blocks, WEIGHTED: tl.constexpr, LANES: tl.constexpr
):
    """kl[r] = kl_weight_r s^2 / 2 * mean((v - v_ref)^2)."""
    row = tl.program_id(0).to(tl.int64)
    s = sensitivity(coef, row)
    value = 0.5 * s * s * (sum_blocks(partial, row, 1, siblings + 2, blocks, LANES) / (elements * 1.0))
    if WEIGHTED:
        value *= tl.load(kl_weights + row)
    tl.store(kl + row, value)


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
    log_ratio, kl, advantages, weights, loss, stats, slopes, rows, siblings,
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
        gain *= tl.load(weights + index // siblings, mask=inside, other=0.0)
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
    slopes, scale, velocity, velocity_old, velocity_ref, uncond, kl_weights, coef, key, noise, gradient,
    uncond_gradient, rows, siblings, elements, blocks,
    GUIDED: tl.constexpr, GUIDANCE: tl.constexpr, KL_COEF: tl.constexpr, WEIGHTED: tl.constexpr, STORED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """gradient = scale / d * (s^2 (sum_j g_j) delta + s sum_j g_j noise_j + KL_COEF kl_w s^2 (v - v_ref) / R).

    s = v_coef / std, g = slopes; times GUIDANCE for `velocity` and 1 - GUIDANCE for `uncond`.
    """
    program = tl.program_id(0).to(tl.int64)
    row, block = program // blocks, program % blocks
    index = block * BLOCK + tl.arange(0, BLOCK)
    inside = index < elements
    v = load_guided(velocity, uncond, row, elements, index, GUIDED, GUIDANCE)
    delta = load_row(velocity_old, row, elements, index) - v
    s = sensitivity(coef, row)
    slope_sum = 0.0
    mixed = tl.zeros([BLOCK], tl.float32)
    if s != 0.0:
        for sibling in range(siblings):
            slope = tl.load(slopes + row * siblings + sibling)
            slope_sum += slope
            mixed += slope * noise_block(noise, key, row, sibling, siblings, elements, block, BLOCK, STORED)
    total = s * (s * slope_sum * delta + mixed)
    if KL_COEF != 0.0:
        share = KL_COEF * s * s / (rows * 1.0)
        if WEIGHTED:
            share *= tl.load(kl_weights + row)
        total += share * (v - load_row(velocity_ref, row, elements, index))
    total *= tl.load(scale) / (elements * 1.0)
    target = row * elements + index
    if GUIDED:
        base = (1.0 - GUIDANCE) * total
        tl.store(uncond_gradient + target, base.to(uncond_gradient.dtype.element_ty), mask=inside)
        total = GUIDANCE * total
    tl.store(gradient + target, total.to(gradient.dtype.element_ty), mask=inside)
