"""Starts the interpreter suite and the public loss on it in a process of its own; checks what needs no kernel run."""

import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
import kernel_aot
from beside import Beside

SUITE = Path(__file__).with_name("test_interpreter.py")
LOSS = Path(__file__).with_name("test_loss.py")
FAST = Path(__file__).with_name("test_fast_noise.py")


def interpret():
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "TEMPFLOW_KERNELS_BACKEND": "triton",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", SUITE, LOSS, FAST]
    return Beside(command, env=environment, cwd=SUITE.parents[2])


def test_every_kernel_in_the_interpreter(begun):
    status, printed = begun.wait()
    assert status == 0, printed[-8000:]
    assert " passed" in printed and "failed" not in printed


test_every_kernel_in_the_interpreter.begin = interpret


def test_kernels_take_no_float_arguments():
    """Inductor passes Python floats to Triton kernels as fp64; numbers are constexpr here or live in device tensors."""
    import triton
    from tempflow_kernels.gpu import loss as triton_loss
    from tempflow_kernels.gpu import noise as triton_noise
    from tempflow_kernels.gpu import transition as triton_transition

    pointers_and_counts = set(kernel_aot.TYPES)
    kernels = [
        value
        for module in (triton_loss, triton_noise, triton_transition)
        for name, value in vars(module).items()
        if name.endswith("_kernel") and isinstance(value, triton.runtime.jit.JITFunction)
    ]
    assert len(kernels) == 9
    for kernel in kernels:
        for parameter in kernel.params:
            assert parameter.is_constexpr == parameter.name.isupper(), (kernel, parameter.name)
            assert parameter.is_constexpr or parameter.name in pointers_and_counts, (kernel, parameter.name)
        assert kernel.__doc__ or kernel.fn.__doc__, "the docstring is the formula"


@pytest.mark.parametrize("target", kernel_aot.TARGETS)
@pytest.mark.parametrize("name", kernel_aot.KERNELS)
def test_compiled_for_real_targets(name, target):
    """No spills, no fp64, few registers, vector accesses, 64-bit addresses."""
    figures = kernel_aot.figures(name, target)
    assert figures.spills == 0 and figures.fp64 == 0
    assert figures.registers <= 80
    assert kernel_aot.narrow_addresses(figures.ttir) == []
    kernel = kernel_aot.KERNELS[name][0]
    reads = sum(kernel_aot.TYPES.get(argument) == kernel_aot.HALF for argument in kernel.arg_names)
    writes = sum(argument.endswith("gradient") for argument in kernel.arg_names)
    fp32_writes = 2 if target.startswith("sm") else 1  # of 8 elements per thread, or of 4
    assert figures.wide_loads >= reads - writes
    assert figures.wide_stores >= (fp32_writes if name in ("normal", "step") else writes)


def test_nothing_is_fused_behind_our_back():
    """This kernel writes no fma: one in its PTX would mean that rounding is left to the compiler."""
    assert "fma." not in kernel_aot.compile_kernel("log_prob", kernel_aot.TARGETS["sm_90"]).asm["ptx"]
    assert "fma." in kernel_aot.compile_kernel("normal", kernel_aot.TARGETS["sm_90"]).asm["ptx"]


COUNTS = ("rows", "siblings", "elements", "blocks", "span")


@pytest.mark.parametrize("ones", [("rows", "siblings", "blocks", "span"), COUNTS, ("siblings", "span")], ids="-".join)
@pytest.mark.parametrize("name", kernel_aot.KERNELS | kernel_aot.FINISHERS)
def test_counts_of_one_compile(name, ones):
    """The launcher turns counts of 1 into constants; the interpreter does not, so only compilation can show it."""
    assert kernel_aot.compile_kernel(name, kernel_aot.TARGETS["sm_90"], ones).asm["cubin"]


@pytest.mark.parametrize("target", kernel_aot.TARGETS)
@pytest.mark.parametrize("name", kernel_aot.FINISHERS)
def test_finishing_kernels_compile_without_spills_and_fp64(name, target):
    figures = kernel_aot.figures(name, target)
    assert figures.spills == 0 and figures.fp64 == 0


@pytest.mark.parametrize("name", ["moments", "velocity_gradient", "step"])
def test_variants_without_options_compile(name, monkeypatch):
    """Stored noise, no guidance, no reference policy, rows that end within a block."""
    kernel, constants = kernel_aot.KERNELS[name]
    plain = {"STORED": True, "REFERENCE": False, "WHOLE": False, "GUIDANCE": None, "KL_COEF": 0.0}
    changed = {argument: plain[argument] for argument in constants}
    monkeypatch.setitem(kernel_aot.KERNELS, name, (kernel, changed))
    for half in ("*fp32", "*fp16"):
        monkeypatch.setattr(kernel_aot, "TYPES", {k: half if v == "*bf16" else v for k, v in kernel_aot.TYPES.items()})
        assert kernel_aot.figures(name, "sm_90").spills == 0
