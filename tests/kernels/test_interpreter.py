"""Every Triton kernel in Triton's interpreter on CPU, against the float64 oracle.

The interpreter must be chosen before kernels are decorated, so these tests run in a process of their own:
`test_triton.py` starts it. By hand: TRITON_INTERPRET=1 pytest tests/kernels/test_interpreter.py
"""

import os

import pytest
import torch
from kernel_cases import Case, oracle_log_ratio
from kernel_contract import (
    CASES,
    check_log_prob,
    check_log_ratio,
    check_loss,
    check_nan,
    check_noise,
    check_step,
    unnumbered,
)  # fmt: skip

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs with TRITON_INTERPRET=1 only (test_triton.py starts it so)", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from tempflow_kernels.cpu import library as native
from tempflow_kernels.cpu import ops as native_ops
from tempflow_kernels.gpu import noise as triton_noise
from tempflow_kernels.gpu import ops as triton_ops
from tempflow_kernels.plain import reference

# The interpreter truncates fp32 to bf16 instead of rounding it, so bf16 gradients are checked on a GPU only.
CASES = [case for case in CASES if case.dtype != torch.bfloat16]
DRAWN = [unnumbered(case) for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_log_ratio_and_loss(case):
    check_log_ratio(triton_ops, case)
    check_loss(triton_ops, case, scale=65536.0)


@pytest.mark.parametrize("case", DRAWN, ids=str)
def test_noise_step_and_log_prob(case):
    check_noise(triton_ops, case)
    check_step(triton_ops, case)
    check_log_prob(triton_ops, case)


def test_bf16_inputs():
    case = Case(shape=(5, 13), dtype=torch.bfloat16)
    check_step(triton_ops, case)
    loss, stats, slopes = triton_ops.branch_loss(*case.loss_arguments)
    wide = Case(shape=(5, 13), dtype=torch.bfloat16)
    wide.tensors |= {name: tensor.float() for name, tensor in wide.tensors.items() if tensor.dtype == torch.bfloat16}
    expected = triton_ops.branch_loss(*wide.loss_arguments)
    assert all(map(torch.equal, (loss, stats, slopes), expected)), "bf16 is widened before any arithmetic"


def test_nan_is_not_clipped_away():
    check_nan(triton_ops, Case())


def test_more_branches_than_lanes():
    check_loss(triton_ops, Case(shape=(8,), rows=12, siblings=24, stored_noise=True))


def test_more_blocks_than_lanes(monkeypatch):
    monkeypatch.setattr(triton_ops, "BLOCK", 16)
    check_loss(triton_ops, Case(shape=(4500,), rows=2, siblings=1, optional=(), stored_noise=True))


def test_log_ratio_error_at_262144_elements_is_below_1e_8():
    case = Case(shape=(16, 128, 128), rows=3, siblings=2, stored_noise=True, distance=1e-3)
    oracle = oracle_log_ratio(case, case.noise.double(), case.velocity.double().unsqueeze(1))
    found = triton_ops.log_ratio(case.ratio_branches, case.siblings)
    assert (found.double() - oracle).abs().max() < 1e-8


def test_negative_std_gives_nan_where_no_check_of_values_is_possible():
    case = Case()
    case.coef[2, 2] = -0.1
    case.tensors["terms"] = reference.gaussian_terms(case.coef, None, None)
    loss, _, slopes = triton_ops.branch_loss(*case.loss_arguments)
    gradient = triton_ops.velocity_gradient(case.branches, slopes, torch.ones(()))
    assert torch.isnan(gradient[2]).all() and not torch.isnan(gradient[0]).any()
    log_prob = triton_ops.transition_step(case.latents, case.velocity, case.coef, case.key, 2, None, 1.0)[1]
    assert torch.isnan(loss) and torch.isnan(log_prob[2]).all() and not torch.isnan(log_prob[0]).any()


def test_noise_is_bit_identical_to_the_c_twin():
    """Both write their fused multiply-adds out; the generic C++ path, which has none, is excepted."""
    if not native.available() or native.describe().startswith("generic"):
        pytest.skip("no C++ library with fused multiply-add in this installation")
    from triton.runtime import interpreter

    if not hasattr(interpreter._interpreter, "fma_fp32"):
        pytest.skip("the interpreter of this triton rounds a fused multiply-add twice; compiled kernels do not")
    key = torch.tensor([[11, 2**32 - 100], [-9, -50]])
    assert torch.equal(triton_ops.normal(key, 3, 20_001), native_ops.normal(key, 3, 20_001))


def test_operators_dispatch_to_triton_and_pass_opcheck():
    if os.environ.get("TEMPFLOW_KERNELS_BACKEND") != "triton":
        pytest.skip("runs with TEMPFLOW_KERNELS_BACKEND=triton only")
    from tempflow_kernels._ops import ops

    case = Case()
    arguments = (*case.branches, case.advantages, *case.clip_range)
    torch.library.opcheck(ops.branch_loss.default, arguments)
    loss, _, slopes = ops.branch_loss(*arguments)
    assert torch.equal(loss, triton_ops.branch_loss(*case.loss_arguments)[0])
    torch.library.opcheck(ops.velocity_gradient.default, (*case.branches, slopes, torch.ones(())))


def test_log_and_trigonometry_of_the_noise():
    """`log_uniform` within 1 ulp and `sin_cos` within 1.5e-7, over the words at both ends and a million between."""
    import triton
    import triton.language as tl

    @triton.jit
    def evaluate(inputs, out, count, BLOCK: tl.constexpr):
        index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(inputs + index)
        sine, cosine = triton_noise.sin_cos(6.2831854820251465 * x)
        tl.store(out + index, triton_noise.log_uniform(x))
        tl.store(out + count + index, sine)
        tl.store(out + 2 * count + index, cosine)

    count, seeded = 2**18, torch.Generator().manual_seed(0)
    between = torch.randint(0, 2**32, (count - 2048,), generator=seeded)
    words = torch.cat([torch.arange(1024), 2**32 - 1 - torch.arange(1024), between])
    u = (words.float().double() * 2.0**-32 + 2.0**-33).float()
    out = torch.empty(3, count)
    evaluate[(count // 2**16,)](u, out, count, BLOCK=2**16)
    angle = (torch.tensor(6.2831854820251465) * u).double()
    log = torch.log(u.double())
    ulp = torch.exp2(torch.floor(torch.log2(log.abs().clamp(min=1e-30))) - 23)
    assert ((out[0].double() - log).abs() / ulp)[log != 0].max() < 1.0
    assert (out[1].double() - torch.sin(angle)).abs().max() < 1.5e-7
    assert (out[2].double() - torch.cos(angle)).abs().max() < 1.5e-7
