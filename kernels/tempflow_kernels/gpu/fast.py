"""Fast normals: Box-Muller by the logarithm, root, sine and cosine instructions of the GPU.

Errors on NVIDIA (PTX ISA): lg2.approx.ftz 2^-22, absolute on (1/2, 2) and relative elsewhere; sqrt.approx.ftz 2^-23,
relative; sin and cos.approx.ftz 2^-20.5, absolute within a turn. AMD CDNA 3: v_log_f32 and v_sqrt_f32 1 ulp; for
v_sin_f32 and v_cos_f32, which count revolutions, no bound is documented.

Near u = 1 the logarithm vanishes, and an absolute error of 2^-22 would be all of it: from 1 - 2^-11 on its first term
takes its place, `-2 log(u) = 2 (1 - u) + (1 - u)^2 + ...`. With these bounds every normal is within 1e-5 of the exact
one, and none is NaN. The angle is rounded as the exact one is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .noise import exact_pair, uniform


@triton.jit
def polar_pair(
    first, second, LOG2: tl.constexpr, SQRT: tl.constexpr, SIN: tl.constexpr, COS: tl.constexpr, TURN: tl.constexpr
):
    """Two uint32 words to two normal deviates; TURN is a full turn, in the unit of SIN and COS, over 2^32."""
    u = uniform(first)
    square = tl.where(u > 0.99951171875, tl.fma(u, -2.0, 2.0), LOG2(u) * -1.3862943611198906)
    radius = SQRT(square)
    angle = second.to(tl.float32) * TURN
    return radius * COS(angle), radius * SIN(angle)


@triton.jit
def nvidia_log2(x):
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def nvidia_sqrt(x):
    return tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def nvidia_sin(x):
    return tl.inline_asm_elementwise("sin.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def nvidia_cos(x):
    return tl.inline_asm_elementwise("cos.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def nvidia_pair(first, second):
    """PTX counts angles in radians."""
    return polar_pair(first, second, nvidia_log2, nvidia_sqrt, nvidia_sin, nvidia_cos, 1.4629180792671596e-09)


# The compiler does not see into assembly, and CDNA 3 wants a pause between such an instruction and a use of its result.
@triton.jit
def amd_log2(x):
    return tl.inline_asm_elementwise("v_log_f32 $0, $1\ns_nop 1", "=v,v", [x], tl.float32, True, 1)


@triton.jit
def amd_sqrt(x):
    return tl.inline_asm_elementwise("v_sqrt_f32 $0, $1\ns_nop 1", "=v,v", [x], tl.float32, True, 1)


@triton.jit
def amd_sin(x):
    return tl.inline_asm_elementwise("v_sin_f32 $0, $1\ns_nop 1", "=v,v", [x], tl.float32, True, 1)


@triton.jit
def amd_cos(x):
    return tl.inline_asm_elementwise("v_cos_f32 $0, $1\ns_nop 1", "=v,v", [x], tl.float32, True, 1)


@triton.jit
def amd_pair(first, second):
    """AMD's sine and cosine count revolutions."""
    return polar_pair(first, second, amd_log2, amd_sqrt, amd_sin, amd_cos, 2.3283064365386963e-10)


@triton.jit
def interpreted_pair(first, second):
    """A stand-in for the interpreter, which knows no assembly: the same formula with library functions."""
    return polar_pair(first, second, tl.log2, tl.sqrt, tl.sin, tl.cos, 1.4629180792671596e-09)


NOISES = {
    "exact": {"cuda": exact_pair, "hip": exact_pair, "interpreter": exact_pair},
    "fast": {"cuda": nvidia_pair, "hip": amd_pair, "interpreter": interpreted_pair},
}
"""What makes two normals of two words, by noise mode and by what runs the kernels."""
