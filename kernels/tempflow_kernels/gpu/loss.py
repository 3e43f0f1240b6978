"""Triton kernels of the log-ratio, the branch loss and its gradient.

Pass 1 (`moments_kernel`) reads the velocities once and regenerates the K noises to form partial sums; one launch
(`objective_kernel`) finishes them in a fixed order; pass 2 (`velocity_gradient_kernel`) regenerates the noises again
and writes the gradient. Nothing of the size of K latents is ever stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .noise import apart, four_normals, inside_row, tile_places, together
from .transition import load_tile, locate, sum_blocks


@triton.jit
def moments_kernel(
    velocity, velocity_old, velocity_ref, terms, key, noise, partial, arrived, siblings, elements, blocks, span,
    REFERENCE: tl.constexpr, STORED: tl.constexpr, PAIR: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial[r, :, block] = sums over the block of dv noise_1 .. dv noise_K, dv^2, (v - v_ref)^2; dv = v_old - v.

    terms (R, 4): weight, square, product, kl. A row with product = 0 draws no noise and leaves its K sums unwritten.
    arrived: set to 0, for the kernel that finishes.
    """
    row, block, first, last = locate(blocks, siblings, span)
    if tl.program_id(0) == 0:
        tl.store(arrived, 0.0)
    QUADS: tl.constexpr = BLOCK // 4
    inside = inside_row(elements, block, BLOCK, WHOLE)
    block_start = tl.cast(block, tl.int64) * BLOCK
    start = row * elements + block_start
    v = load_tile(velocity, start, inside, BLOCK)
    delta = load_tile(velocity_old, start, inside, BLOCK) - v
    sums = partial + (row * (siblings + 2) * blocks + block)
    if first == 0:
        squares = sums + tl.cast(siblings, tl.int64) * blocks
        tl.store(squares, tl.sum(delta * delta))
        if REFERENCE:
            distance = v - load_tile(velocity_ref, start, inside, BLOCK)
            tl.store(squares + blocks, tl.sum(distance * distance))
    sums += tl.cast(first, tl.int64) * blocks
    if tl.load(terms + row * 4 + 2) == 0.0:
        last = first
    if STORED:
        source = (row * siblings + first) * elements + block_start
        for _ in range(first, last):
            tl.store(sums, tl.sum(delta * load_tile(noise, source, inside, BLOCK)))
            source += elements
            sums += blocks
    else:
        d0, d1, d2, d3 = apart(delta, QUADS)
        seed, quads = tl.load(key + row * 2), tl.cast((elements + 3) // 4, tl.int64)  # K d / 4 may pass 2**31
        counter = tl.load(key + row * 2 + 1) + first * quads + tl.cast(block, tl.int64) * QUADS
        for _ in range(first, last):
            n0, n1, n2, n3 = four_normals(seed, counter, QUADS, PAIR)
            tl.store(sums, tl.sum(tl.fma(d3, n3, tl.fma(d2, n2, tl.fma(d1, n1, d0 * n0)))))
            counter += quads
            sums += blocks


@triton.jit
def branch_log_ratio(partial, terms, branch, inside, siblings, elements, blocks, LANES: tl.constexpr):
    """log_ratio_j = -(square mean(dv^2) + product mean(dv noise_j)) of a vector of branches, numbered r K + j."""
    row, count = branch // siblings, elements * 1.0
    square = tl.load(terms + row * 4 + 1, mask=inside, other=0.0)
    product = tl.load(terms + row * 4 + 2, mask=inside, other=0.0)
    line = row * (siblings + 2)
    moved = sum_blocks(partial, line + siblings, inside, blocks, LANES)
    along = sum_blocks(partial, line + branch % siblings, inside & (product != 0.0), blocks, LANES)
    return -(square * (moved / count) + product * (along / count))


@triton.jit
def log_ratio_kernel(
    partial, terms, log_ratio, rows, siblings, elements, blocks, LINES: tl.constexpr, LANES: tl.constexpr
):
    """log_ratio (R, K) of the partial sums, LINES branches a program."""
    branch = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    inside = branch < tl.cast(rows, tl.int64) * siblings
    value = branch_log_ratio(partial, terms, branch, inside, siblings, elements, blocks, LANES)
    tl.store(log_ratio + branch, value, mask=inside)


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
def objective(
    ratios, kl, advantages, terms, loss, stats, slopes, rows, siblings,
    LOW: tl.constexpr, HIGH: tl.constexpr, KL_COEF: tl.constexpr, REFERENCE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Loss, statistics and d loss / d log_ratio from log-ratios (R, K) and kl (R,), LANES branches at a time in order.

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
        x = tl.load(ratios + index, mask=inside, other=0.0, cache_modifier=".cg")
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
    kl_sum = zero
    for first in range(0, rows if REFERENCE else 0, LANES):
        kl_sum += tl.load(kl + first + lane, mask=first + lane < rows, other=0.0, cache_modifier=".cg")
    kl_mean = tl.sum(kl_sum) / (rows * 1.0)
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
def objective_kernel(
    partial, advantages, terms, loss, stats, slopes, rows, siblings, elements, blocks,
    LOW: tl.constexpr, HIGH: tl.constexpr, KL_COEF: tl.constexpr, REFERENCE: tl.constexpr,
    LINES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Log-ratios and kl[r] = terms[r, 3] * mean((v - v_ref)^2), LINES branches a program; the last makes the loss.

    They pass through the end of `partial`. `loss` counts the programs that are done until the last one writes it:
    which one that is depends on chance, what it computes, and in which order, does not.
    """
    branch = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    inside = branch < tl.cast(rows, tl.int64) * siblings
    row = branch // siblings
    ratios = partial + tl.cast(rows, tl.int64) * (siblings + 2) * blocks
    kl = ratios + tl.cast(rows, tl.int64) * siblings
    value = branch_log_ratio(partial, terms, branch, inside, siblings, elements, blocks, LANES)
    tl.store(ratios + branch, value, mask=inside)
    if REFERENCE:
        first = inside & (branch % siblings == 0)
        square = sum_blocks(partial, row * (siblings + 2) + siblings + 1, first, blocks, LANES) / (elements * 1.0)
        tl.store(kl + row, tl.load(terms + row * 4 + 3, mask=first, other=0.0) * square, mask=first)
    # Every thread has stored before one of them says so. On AMD the barrier alone does not wait for the stores of other
    # waves; there all LINES stores are those of the wave that counts.
    tl.static_assert(LINES <= 32)
    tl.debug_barrier()
    if tl.atomic_add(loss, 1.0, sem="acq_rel") == tl.num_programs(0) - 1:
        objective(
            ratios, kl, advantages, terms, loss, stats, slopes, rows, siblings, LOW, HIGH, KL_COEF, REFERENCE,
            LINES * LANES,
        )  # fmt: skip


@triton.jit
def drawn_mix(slope, seed, counter, product, siblings, quads, QUADS: tl.constexpr, PAIR: tl.constexpr):
    """sum_j slope_j noise_j as a (QUADS, 4) tile, from drawn noise; 0 where product = 0."""
    zero = tl.zeros([QUADS], tl.float32)
    m0, m1, m2, m3 = zero, zero, zero, zero
    for _ in range(0, tl.where(product == 0.0, 0, siblings)):
        n0, n1, n2, n3 = four_normals(seed, counter, QUADS, PAIR)
        weight = tl.load(slope) + zero
        m0, m1 = tl.fma(weight, n0, m0), tl.fma(weight, n1, m1)
        m2, m3 = tl.fma(weight, n2, m2), tl.fma(weight, n3, m3)
        counter += quads
        slope += 1
    return together(m0, m1, m2, m3, QUADS)


@triton.jit
def stored_mix(slope, noise, source, product, siblings, elements, inside, BLOCK: tl.constexpr):
    """The same from stored noise (R, K, elements), whose first sibling begins at `source`."""
    mixed = tl.zeros([BLOCK // 4, 4], tl.float32)
    for _ in range(0, tl.where(product == 0.0, 0, siblings)):
        mixed += tl.load(slope) * load_tile(noise, source, inside, BLOCK)
        source += elements
        slope += 1
    return mixed


@triton.jit
def velocity_gradient_kernel(
    slopes, scale, velocity, velocity_old, velocity_ref, terms, key, noise, gradient, rows, siblings, elements, blocks,
    KL_COEF: tl.constexpr, STORED: tl.constexpr, PAIR: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """gradient = scale / d * (2 square (sum_j g_j) dv + product sum_j g_j noise_j + 2 KL_COEF kl (v - v_ref) / R).

    square, product and kl from terms (R, 4), dv = v_old - v, g = slopes.
    """
    row, block, _, _ = locate(blocks, siblings, siblings)
    QUADS: tl.constexpr = BLOCK // 4
    inside = inside_row(elements, block, BLOCK, WHOLE)
    block_start = tl.cast(block, tl.int64) * BLOCK
    start = row * elements + block_start
    square, product = tl.load(terms + row * 4 + 1), tl.load(terms + row * 4 + 2)
    slope = slopes + row * siblings
    if STORED:
        source = row * siblings * elements + block_start
        mixed = stored_mix(slope, noise, source, product, siblings, elements, inside, BLOCK)
    else:
        seed, quads = tl.load(key + row * 2), tl.cast((elements + 3) // 4, tl.int64)  # K d / 4 may pass 2**31
        counter = tl.load(key + row * 2 + 1) + tl.cast(block, tl.int64) * QUADS
        mixed = drawn_mix(slope, seed, counter, product, siblings, quads, QUADS, PAIR)
    v = load_tile(velocity, start, inside, BLOCK)
    delta = load_tile(velocity_old, start, inside, BLOCK) - v
    every = tl.full([1], 0, tl.int64) + row
    slope_sum = tl.sum(sum_blocks(slopes, every, every >= 0, siblings, 32))
    total = 2.0 * square * slope_sum * delta + product * mixed
    if KL_COEF != 0.0:
        share = 2.0 * KL_COEF * tl.load(terms + row * 4 + 3) / (rows * 1.0)
        total += share * (v - load_tile(velocity_ref, start, inside, BLOCK))
    total *= tl.load(scale) / (elements * 1.0)
    target = gradient + start + tile_places(BLOCK)
    tl.store(target, total.to(gradient.dtype.element_ty), mask=inside)
