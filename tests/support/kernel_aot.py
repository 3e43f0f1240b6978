"""Compiles the Triton kernels for GPUs that are not there and reads what the compiler made of them.

`python tests/support/kernel_aot.py` prints the table of kernels/README.md.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from tempflow_kernels.gpu import (
    loss as triton_loss,
)
from tempflow_kernels.gpu import (
    noise as triton_noise,
)
from tempflow_kernels.gpu import (
    ops as triton_ops,
)
from tempflow_kernels.gpu import (
    transition as triton_transition,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
HALF, COUNT = "*bf16", "i32"
TYPES = {
    name: kind
    for kind, names in {
        "*fp32": "coef terms next_latents partial slopes scale noise log_prob log_ratio kl advantages loss stats",
        "*i64": "key",
        HALF: "latents velocity velocity_old velocity_ref uncond gradient",
        COUNT: "rows siblings elements blocks",
    }.items()
    for name in names.split()
}
GUIDED = {"GUIDED": True, "GUIDANCE": 4.5}
KERNELS = {
    "normal": (triton_noise.normal_kernel, {}),
    "step": (triton_transition.step_kernel, GUIDED),
    "log_prob": (triton_transition.log_prob_kernel, {}),
    "log_prob_gradient": (triton_transition.log_prob_gradient_kernel, {}),
    "moments": (triton_loss.moments_kernel, {"REFERENCE": True, "STORED": False}),
    "velocity_gradient": (triton_loss.velocity_gradient_kernel, {"KL_COEF": 0.004, "STORED": False}),
}


LANES = {"LANES": triton_ops.LANES}
FINISHERS = {
    "log_prob_finish": (triton_transition.log_prob_finish_kernel, LANES),
    "log_ratio": (triton_loss.log_ratio_kernel, LANES),
    "reference_kl": (triton_loss.reference_kl_kernel, LANES),
    "objective": (
        triton_loss.objective_kernel,
        LANES | {"LOW": 1e-4, "HIGH": 1e-4, "KL_COEF": 0.004, "REFERENCE": True},
    ),
}


@dataclass
class Figures:
    """What one compilation came to; `wide` counts vector loads (and stores) of global memory.

    A program handles 1024 elements. On NVIDIA its 128 threads take 8 each and move 128 bits at a time. On AMD the
    same 4 warps are 256 threads with 4 elements each: 128 bits of fp32, but 64 of bf16, which is all a thread has.
    """

    registers: int
    spills: int
    instructions: int
    wide_loads: int
    wide_stores: int
    fp64: int
    ttir: str


def compile_kernel(name, target, ones=()):
    """The compiled kernel, pointers and row length being multiples of 16 as for all latents of real models.

    `ones`: counts that are 1; the launcher compiles a variant of its own for these.
    """
    kernel, constants = (KERNELS | FINISHERS)[name]
    names = kernel.arg_names
    constants = ({"BLOCK": triton_ops.BLOCK} if name in KERNELS else {}) | constants
    constants |= {argument: 1 for argument in ones if argument in names}
    signature = {argument: "constexpr" if argument in constants else TYPES[argument] for argument in names}
    aligned = [i for i, argument in enumerate(names) if signature[argument][0] == "*" or argument == "elements"]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(argument),): value for argument, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned if names[i] not in constants},
    )
    return triton.compile(source, target=target, options=dict(triton_ops.OPTIONS))


def figures(name, target_name):
    """Compile for one target and read registers, spills, instructions and access widths."""
    compiled = compile_kernel(name, TARGETS[target_name])
    return (_amd if "amdgcn" in compiled.asm else _nvidia)(compiled.asm)


def _nvidia(asm):
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z]\w+)", sass, re.MULTILINE)
    return Figures(
        registers=int(used["REG"]),
        spills=int(used["STACK"]) + int(used["LOCAL"]),
        instructions=sum(instruction != "NOP" for instruction in instructions),
        wide_loads=len(re.findall(r"ld\.global\S*\.v4\.b32", asm["ptx"])),
        wide_stores=len(re.findall(r"st\.global\S*\.v4\.b32", asm["ptx"])),
        fp64=len(re.findall(r"\.f64", asm["ptx"])),
        ttir=asm["ttir"],
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
    """Pointer additions with 32-bit offsets, other than the number of a sibling and constants.

    A row or an element offset beyond 2**31 must be 64 bits wide from its first multiplication.
    """
    constants = set(re.findall(r"(%\S+) = arith\.constant", ttir))
    found = re.findall(r"tt\.addptr \S+, (%\S+) : \S+, (?:i32|tensor<\d+xi32>)", ttir)
    return [offset for offset in found if offset not in constants and offset != "%sibling"]


def main():
    print(f"triton {triton.__version__}, BLOCK {triton_ops.BLOCK}, {triton_ops.OPTIONS['num_warps']} warps, bf16")
    print("| kernel | target | registers | spills | instructions | vector loads | stores | fp64 |\n|" + "---|" * 8)
    for name in KERNELS:
        for target in TARGETS:
            f = figures(name, target)
            row = (f.registers, f.spills, f.instructions, f.wide_loads, f.wide_stores, f.fp64)
            print(f"| {name} | {target} | " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
