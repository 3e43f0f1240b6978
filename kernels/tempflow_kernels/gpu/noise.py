"""Noise inside Triton kernels: the mapping of `philox`, word for word, and two ways from words to normals.

*Exact*: all float arithmetic is explicit (`tl.fma`, `tl.sqrt_rn`; the launchers switch automatic contraction off), so
the numbers do not depend on the compiler's choices: they are bit-identical in the interpreter, on any GPU and in the
C++ twin on processors with fused multiply-add. Against plain torch, whose log and cos differ by device, they agree to
a few ulp. Logarithm, sine and cosine are polynomials fitted to the narrow ranges that occur here (`log_uniform`: within
1 ulp on (0, 1]; `sin_cos`: within 1.5 ulp of the result on (0, 2 pi], an absolute error below 1e-7).

*Fast*: logarithm, root, sine and cosine are the GPU's own instructions. The words are the same, the normals are within
1e-5 of the exact ones, and half the instructions are gone.

The four normals of one counter are kept apart, in four vectors, so that a loop over siblings moves nothing between
threads; inputs are split to match once, before the loop.
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
def uniform(word):
    """A uint32 word to a uniform in (0, 1]."""
    return tl.fma(word.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)


@triton.jit
def exact_pair(first, second):
    """Two uint32 words to two normal deviates; `-2 log` and `2 pi u` are rounded as in the reference."""
    radius = tl.sqrt_rn(-2.0 * log_uniform(uniform(first)))
    sine, cosine = sin_cos(6.2831854820251465 * uniform(second))
    return radius * cosine, radius * sine


@triton.jit
def multiply_words(word, CONSTANT: tl.constexpr):
    """High and low 32 bits of `CONSTANT * word`, from one 64-bit product."""
    product = word.to(tl.uint64) * CONSTANT
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox_words(seed, counter, QUADS: tl.constexpr):
    """Four vectors of QUADS uint32 words: Philox4x32-10 at `counter`, `counter + 1`, ... with the key `seed`.

    Args:
        seed, counter: scalars int64.
    """
    index = counter + tl.arange(0, QUADS)
    c0, c1 = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c2, c3 = tl.zeros_like(c0), tl.zeros_like(c0)
    for _ in tl.static_range(10):
        high0, low0 = multiply_words(c0, 0xD2511F53)
        high1, low1 = multiply_words(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def four_normals(seed, counter, QUADS: tl.constexpr, PAIR: tl.constexpr):
    """Normals 4 i, 4 i + 1, 4 i + 2 and 4 i + 3 of a draw, four vectors of QUADS each.

    Args:
        seed, counter: as `philox_words`. PAIR: makes two normals of two words (`NOISES`).
    """
    w0, w1, w2, w3 = philox_words(seed, counter, QUADS)
    n0, n1 = PAIR(w0, w1)
    n2, n3 = PAIR(w2, w3)
    return n0, n1, n2, n3


@triton.jit
def apart(tile, QUADS: tl.constexpr):
    """The four columns of a (QUADS, 4) tile."""
    even, odd = tl.split(tl.reshape(tile, [QUADS, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def together(x0, x1, x2, x3, QUADS: tl.constexpr):
    """The (QUADS, 4) tile of four columns."""
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [QUADS, 4])


@triton.jit
def tile_places(BLOCK: tl.constexpr):
    """Places of the elements of a block in memory, as a (BLOCK / 4, 4) tile: a row for every counter."""
    return tl.arange(0, BLOCK // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]


@triton.jit
def inside_row(elements, block, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Which elements of a block belong to the row. Rows of WHOLE blocks need no comparison: it folds away."""
    places = tile_places(BLOCK)
    left = tl.minimum(elements - tl.cast(block, tl.int64) * BLOCK, BLOCK).to(tl.int32)
    return tl.full(places.shape, True, tl.int1) if WHOLE else places < left


@triton.jit
def normal_kernel(key, noise, siblings, elements, blocks, PAIR: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """noise[r, j, i] = normal deviate number i of sibling j of row r."""
    program = tl.program_id(0)
    draw, block = (program // blocks).to(tl.int64), program % blocks
    row, sibling = draw // siblings, draw % siblings
    seed, offset = tl.load(key + row * 2), tl.load(key + row * 2 + 1)
    counter = offset + sibling * ((elements + 3) // 4) + tl.cast(block, tl.int64) * (BLOCK // 4)
    n0, n1, n2, n3 = four_normals(seed, counter, BLOCK // 4, PAIR)
    values = together(n0, n1, n2, n3, BLOCK // 4)
    target = noise + (draw * elements + tl.cast(block, tl.int64) * BLOCK)
    tl.store(target + tile_places(BLOCK), values, mask=inside_row(elements, block, BLOCK, WHOLE))
