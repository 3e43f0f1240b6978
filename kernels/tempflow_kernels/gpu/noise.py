"""Noise inside Triton kernels: the mapping of `philox`, word for word.

All float arithmetic is explicit (`tl.fma`, `tl.sqrt_rn`; the launchers switch automatic contraction off), so the
numbers do not depend on the compiler's choices: they are bit-identical in the interpreter, on any GPU and in the C++
twin on processors with fused multiply-add. Against plain torch, whose log and cos differ by device, they agree to a
few ulp. Logarithm, sine and cosine are polynomials fitted to the narrow ranges that occur here (`log_uniform`: within
1 ulp on (0, 1]; `sin_cos`: within 1.5 ulp of the result on (0, 2 pi], an absolute error below 1e-7).
"""

from __future__ import annotations

import triton
import triton.language as tl

LAUNCH = {"enable_fp_fusion": False}
"""Compiler options of every kernel."""


@triton.jit
def log_uniform(u):
    """log(u) for u in (0, 1]: `e ln 2 + log(1 + f)` with 1 + f in [sqrt(1/2), sqrt(2))."""
    shifted = u.to(tl.int32, bitcast=True) - 0x3F3504F3
    exponent = (shifted >> 23).to(tl.float32)
    f = ((shifted & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    p = tl.fma(f, -0.07634429633617401, 0.12761549651622772)
    p = tl.fma(f, p, -0.131601944565773)
    p = tl.fma(f, p, 0.14201761782169342)
    p = tl.fma(f, p, -0.16623356938362122)
    p = tl.fma(f, p, 0.20001226663589478)
    p = tl.fma(f, p, -0.250008225440979)
    p = tl.fma(f, p, 0.3333333134651184)
    square = f * f
    tail = tl.fma(exponent, -1.9046542121259336e-09, (f * square) * p)
    tail = tl.fma(square, -0.5, tail)
    return tl.fma(exponent, 0.6931471824645996, f + tail)


@triton.jit
def sin_cos(angle):
    """sin and cos for an angle in (0, 2 pi], reduced to [-pi/4, pi/4] in two exact-product steps."""
    shifted = tl.fma(angle, 0.6366197466850281, 12582912.0)  # adding 1.5 * 2**23 rounds to an integer in the low bits
    quadrant = shifted.to(tl.int32, bitcast=True)
    count = shifted - 12582912.0
    x = tl.fma(count, -1.5707963705062866, angle)
    x = tl.fma(count, 4.371138828673793e-08, x)
    square = x * x
    s = tl.fma(square, -0.000195144530152902, 0.008332154713571072)
    s = tl.fma(square, s, -0.16666655242443085)
    s = tl.fma(x * square, s, x)
    c = tl.fma(square, 2.443220728309825e-05, -0.0013887308305129409)
    c = tl.fma(square, c, 0.04166664555668831)
    c = tl.fma(square * square, c, tl.fma(square, -0.5, 1.0))
    odd = (quadrant & 1) != 0
    sine, cosine = tl.where(odd, c, s), tl.where(odd, s, c)
    sine = tl.where((quadrant & 2) != 0, -sine, sine)
    cosine = tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine)
    return sine, cosine


@triton.jit
def box_muller(first, second):
    """Two uint32 words to two normal deviates; `-2 log` and `2 pi u` are rounded as in the reference."""
    u = tl.fma(first.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)
    v = tl.fma(second.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)
    radius = tl.sqrt_rn(-2.0 * log_uniform(u))
    sine, cosine = sin_cos(6.2831854820251465 * v)
    return radius * cosine, radius * sine


@triton.jit
def normal_block(seed, counter, BLOCK: tl.constexpr):
    """BLOCK consecutive normal deviates of one draw.

    Args:
        seed: scalar int64. counter: scalar int64, the Philox counter of the first four numbers. BLOCK: a multiple of 4.
    """
    index = counter + tl.arange(0, BLOCK // 4)
    low, high = (index & 0xFFFFFFFF).to(tl.uint32), ((index >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = low * 0
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [BLOCK])


@triton.jit
def noise_block(noise, key, row, sibling, siblings, elements, block, BLOCK: tl.constexpr, STORED: tl.constexpr):
    """BLOCK numbers of sibling `sibling` of row `row`: read from `noise` (R, K, elements) if STORED, else drawn."""
    if STORED:
        index = block * BLOCK + tl.arange(0, BLOCK)
        start = noise + (row * siblings + sibling) * elements
        return tl.load(start + index, mask=index < elements, other=0.0).to(tl.float32)
    seed, offset = tl.load(key + row * 2), tl.load(key + row * 2 + 1)
    quads = (elements + 3) // 4
    first = tl.cast(sibling, tl.int64) * quads  # K d / 4 may pass 2**31
    return normal_block(seed, offset + first + block * (BLOCK // 4), BLOCK)


@triton.jit
def normal_kernel(key, noise, siblings, elements, blocks, BLOCK: tl.constexpr):
    """noise[r, j, i] = normal deviate number i of sibling j of row r."""
    program = tl.program_id(0).to(tl.int64)
    draw, block = program // blocks, program % blocks
    values = noise_block(key, key, draw // siblings, draw % siblings, siblings, elements, block, BLOCK, False)
    index = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(noise + draw * elements + index, values, mask=index < elements)
