"""Compiles the Triton kernels for GPUs that are not there and reads what the compiler made of them.

`python tests/support/kernel_aot.py` prints the table of kernels/README.md.
"""

import re
from dataclasses import dataclass

import kernel_sass
import triton
from tempflow_kernels.gpu import loss as triton_loss
from tempflow_kernels.gpu import noise as triton_noise
from tempflow_kernels.gpu import ops as triton_ops
from tempflow_kernels.gpu import transition as triton_transition
from tempflow_kernels.gpu.fast import NOISES
from tempflow_kernels.gpu.launch import OPTIONS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
HALF, COUNT = "*bf16", "i32"
NUMBERS = triton_ops.BLOCK // (32 * OPTIONS["num_warps"])
"""Elements of a block per thread on NVIDIA."""
TYPES = {
    name: kind
    for kind, names in {
        "*fp32": "coef terms next_latents partial arrived slopes scale noise log_prob log_ratio advantages loss stats",
        "*i64": "key",
        HALF: "latents velocity velocity_old velocity_ref uncond gradient",
        COUNT: "rows siblings elements blocks span",
    }.items()
    for name in names.split()
}
WHOLE = {"WHOLE": True}
KERNELS = {
    "normal": (triton_noise.normal_kernel, WHOLE),
    "step": (triton_transition.step_kernel, WHOLE | {"GUIDANCE": 4.5}),
    "log_prob": (triton_transition.log_prob_kernel, WHOLE),
    "log_prob_gradient": (triton_transition.log_prob_gradient_kernel, WHOLE),
    "moments": (triton_loss.moments_kernel, WHOLE | {"REFERENCE": True, "STORED": False}),
    "velocity_gradient": (triton_loss.velocity_gradient_kernel, WHOLE | {"KL_COEF": 0.004, "STORED": False}),
}
DRAWING = ("normal", "step", "moments", "velocity_gradient")
"""Kernels that draw noise: each compiles in every noise mode."""
LINES = {"LINES": triton_ops.LINES, "LANES": triton_ops.LANES}
FINISHERS = {
    "log_prob_finish": (triton_transition.log_prob_finish_kernel, LINES),
    "log_ratio": (triton_loss.log_ratio_kernel, LINES),
    "objective": (
        triton_loss.objective_kernel,
        LINES | {"LOW": 1e-4, "HIGH": 1e-4, "KL_COEF": 0.004, "REFERENCE": True},
    ),
}


@dataclass
class Figures:
    """What one compilation came to; `wide` counts vector loads (and stores) of global memory.

    The four numbers of a counter stay in one thread, so it moves four at a time: 128 bits of fp32, 64 of bf16.
    """

    registers: int
    spills: int
    instructions: int
    wide_loads: int
    wide_stores: int
    fp64: int
    ttir: str
    slots: kernel_sass.Slots | None = None
    """Of NVIDIA's machine code."""


def compile_kernel(name, target, ones=(), noise="exact"):
    """The compiled kernel, pointers and row length being multiples of 16 as for all latents of real models.

    `ones`: counts that are 1; the launcher compiles a variant of its own for these. `noise`: exact or fast.
    """
    kernel, constants = (KERNELS | FINISHERS)[name]
    names = kernel.arg_names
    shared = {"BLOCK": triton_ops.BLOCK, "PAIR": NOISES[noise][target.backend]}
    constants = {argument: value for argument, value in shared.items() if argument in names} | constants
    constants |= {argument: 1 for argument in ones if argument in names}
    signature = {argument: "constexpr" if argument in constants else TYPES[argument] for argument in names}
    aligned = [i for i, argument in enumerate(names) if signature[argument][0] == "*" or argument == "elements"]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(argument),): value for argument, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned if names[i] not in constants},
    )
    return triton.compile(source, target=target, options=dict(OPTIONS))


def figures(name, target_name, noise="exact"):
    """Compile for one target and read registers, spills, instructions and access widths."""
    compiled = compile_kernel(name, TARGETS[target_name], noise=noise)
    return (_amd if "amdgcn" in compiled.asm else _nvidia)(compiled.asm)


def _nvidia(asm):
    used, instructions = kernel_sass.read(asm["cubin"])
    return Figures(
        registers=int(used["REG"]),
        spills=int(used["STACK"]) + int(used["LOCAL"]),
        instructions=len(instructions),
        wide_loads=len(re.findall(r"ld\.global\S*\.v[24]\.b32", asm["ptx"])),
        wide_stores=len(re.findall(r"st\.global\S*\.v[24]\.b32", asm["ptx"])),
        fp64=len(re.findall(r"\.f64", asm["ptx"])),
        ttir=asm["ttir"],
        slots=kernel_sass.slots(instructions),
    )


def _amd(asm):
    text = asm["amdgcn"]
    body = text[: text.find(".amdgpu_metadata")]
    return Figures(
        registers=int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1]),
        spills=int(re.search(r"\.vgpr_spill_count:\s*(\d+)", text)[1]),
        instructions=len(re.findall(r"^\s+(?:v|s|global|buffer|ds)_\w+", body, re.MULTILINE)),
        wide_loads=len(re.findall(r"(?:global|buffer)_load_(?:dwordx[24]|b64|b128)\b", body)),
        wide_stores=len(re.findall(r"(?:global|buffer)_store_(?:dwordx[24]|b64|b128)\b", body)),
        fp64=len(re.findall(r"\bv_\w+_f64", body)),
        ttir=asm["ttir"],
    )


def narrow_addresses(ttir):
    """Pointer additions with 32-bit offsets, other than constants, counts and places within one block.

    A row or an element offset beyond 2**31 must be 64 bits wide from its first multiplication.
    """
    small = {f"%{name}" for name, kind in TYPES.items() if kind == COUNT}
    places = set(re.findall(r"(%\S+) = (?:arith\.constant|tt\.make_range)", ttir))
    derived = re.findall(r"(%\S+) = (?:arith\.\w+|tt\.\w+) ([^:{]*?)(?: \{[^}]*\})? : [^\n]*i32", ttir)
    for name, operands in derived:
        if set(re.findall(r"%[\w#:]+", operands)) <= places:
            places.add(name)
    found = re.findall(r"tt\.addptr \S+, (%\S+) : \S+, (?:i32|tensor<[\dx]+xi32>)", ttir)
    return [offset for offset in found if offset not in small | places]


def main():
    print(f"triton {triton.__version__}, BLOCK {triton_ops.BLOCK}, {OPTIONS['num_warps']} warps, bf16")
    header = "kernel | noise | target | registers | spills | instructions | per number and sibling | loads | stores"
    print(f"| {header} | fp64 |\n|" + "---|" * 10)
    for name in KERNELS:
        for noise in ("exact", "fast") if name in DRAWING else ("",):
            for target in TARGETS:
                f = figures(name, target, noise or "exact")
                loop = f"{f.slots.loop / NUMBERS:.1f}" if f.slots and f.slots.loop else ""
                row = (f.registers, f.spills, f.instructions, loop, f.wide_loads, f.wide_stores, f.fp64)
                print(f"| {name} | {noise} | {target} | " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
