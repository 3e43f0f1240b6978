"""What the kernels issue: instructions per number and sibling, barriers, spills and fp64, compiled for real GPUs.

A thread issues the instructions of the loop over siblings once for each of its 8 numbers of a block; slow paths of a
square root, which a branch skips, are not counted. On these counts the predictions of kernels/README.md rest.
"""

import re

import pytest

pytest.importorskip("triton", reason="triton is not installed")
import kernel_aot
import kernel_sass
import triton

MOST = {
    "sm_80": {"step": (52, 27), "moments": (49, 24), "velocity_gradient": (47, 22)},
    "sm_90": {"step": (55, 30), "moments": (48, 24), "velocity_gradient": (46, 22)},
    "sm_100": {"step": (43, 28), "moments": (40, 24), "velocity_gradient": (38, 21)},
}
"""Issue slots per number and sibling with exact and with fast noise."""
BARRIERS = {"step": 2, "moments": 2, "velocity_gradient": 0}
NOISES = ("exact", "fast")
OLDER = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
"""Triton 3.6 waits once more per sibling in a sum, issues up to .25 more, and on sm_100 up to a fifth more."""


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("target", MOST)
@pytest.mark.parametrize("name", BARRIERS)
def test_issue_slots_and_barriers_per_sibling(name, target, noise):
    slots = kernel_aot.figures(name, target, noise).slots
    most = MOST[target][name][NOISES.index(noise)] * (1.2 if OLDER and target == "sm_100" else 1) + 0.25 * OLDER
    assert 10 < slots.loop / kernel_aot.NUMBERS <= most
    assert slots.barriers <= BARRIERS[name] + (OLDER and BARRIERS[name] > 0)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("target", kernel_aot.TARGETS)
@pytest.mark.parametrize("name", kernel_aot.DRAWING)
def test_no_spills_and_no_fp64(name, target, noise):
    figures = kernel_aot.figures(name, target, noise)
    assert figures.spills == 0 and figures.fp64 == 0 and figures.registers <= 80


@pytest.mark.parametrize(("target", "instruction"), [("sm_90", "lg2.approx.ftz.f32"), ("gfx942", "v_log_f32")])
def test_fast_noise_is_made_of_the_instructions_of_the_gpu(target, instruction):
    text = {noise: kernel_aot.compile_kernel("normal", kernel_aot.TARGETS[target], noise=noise).asm for noise in NOISES}
    code = {noise: asm["amdgcn"] if "amdgcn" in asm else asm["ptx"] for noise, asm in text.items()}
    assert instruction in code["fast"] and instruction not in code["exact"]


MOST_ON_AMD = {"normal": (490, 360), "step": (560, 440), "moments": (595, 470), "velocity_gradient": (540, 425)}
"""Instructions of a whole kernel for gfx942, whose threads have 4 numbers each; with exact and with fast noise."""


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("name", MOST_ON_AMD)
def test_instructions_on_amd(name, noise):
    most = MOST_ON_AMD[name][NOISES.index(noise)] * (1.1 if OLDER else 1)
    assert 100 < kernel_aot.figures(name, "gfx942", noise).instructions <= most


@pytest.mark.parametrize(("target", "waits"), [
    ("sm_90", ["bar.sync", "atom.global.gpu.acq_rel", "bar.sync"]),
    ("gfx942", ["s_barrier", "buffer_wbl2", "s_waitcnt vmcnt(0)", "global_atomic_add", "s_barrier"]),
])  # fmt: skip
def test_what_the_last_program_reads_was_stored_before_it_was_counted(target, waits):
    asm = kernel_aot.compile_kernel("objective", kernel_aot.TARGETS[target]).asm
    code = asm["amdgcn"] if "amdgcn" in asm else asm["ptx"]
    counted = re.search(r"(atom\.\S*|global_atomic_add)", code).start()
    stored = max(found.start() for found in re.finditer(r"(st\.global|global_store|buffer_store)", code[:counted]))
    place = stored
    for wait in waits:
        place = code.find(wait, place)
        assert place >= 0, wait
        place += len(wait)


def test_slots_of_a_listing():
    """The counter itself: of the loop, a skipped call and the way there do not count."""
    listing = [
        "S2R R0, SR_TID.X", "MUFU.RSQ R1, R2", "@!P0 BRA 0x50", "MOV R9, 0x40", "CALL.REL.NOINC 0x90",
        "BAR.SYNC.DEFER_BLOCKING 0x0", "@P1 BRA 0x10", "EXIT", "BRA 0x80",
    ]  # fmt: skip
    instructions = [kernel_sass.Instruction(16 * place, text) for place, text in enumerate(listing)]
    assert kernel_sass.slots(instructions) == kernel_sass.Slots(2, 4, barriers=1, special=1, shortest=4)
