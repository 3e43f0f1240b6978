"""The Triton kernels on a real device: contract, determinism, CUDA graphs. `first_half_hour.py` adds the timing."""

import pytest
import tempflow_kernels as tk
import torch
from kernel_cases import Case
from kernel_contract import (
    CASES,
    check_fast_noise,
    check_log_prob,
    check_log_ratio,
    check_loss,
    check_nan,
    check_noise,
    check_step,
    on_device,
    unnumbered,
)
from tempflow_kernels.noise_setting import MODES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
]


@pytest.fixture(autouse=True)
def noise():
    """The exact noise of the contract; the setting of the process comes back."""
    before = tk.noise_mode()
    tk.use_noise("exact")
    yield
    tk.use_noise(before)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case):
    from tempflow_kernels.gpu import ops as triton_ops

    case = on_device(case, "cuda")
    check_log_ratio(triton_ops, case)
    check_loss(triton_ops, case, scale=65536.0)
    for check in (check_noise, check_step, check_log_prob):
        check(triton_ops, unnumbered(case))


@pytest.mark.parametrize("shape", [(16, 64, 64), (3, 7, 11)])
def test_fast_noise(shape):
    from tempflow_kernels.gpu import ops as triton_ops

    check_fast_noise(triton_ops, Case(shape=shape, siblings=6, device="cuda"))


def test_nan_is_not_clipped_away():
    from tempflow_kernels.gpu import ops as triton_ops

    check_nan(triton_ops, Case(device="cuda"))


def test_public_operators_dispatch_to_triton_and_train():
    tk.use_noise("fast")
    case = Case(shape=(16, 16, 16), dtype=torch.bfloat16, device="cuda")
    leaf = case.velocity.clone().requires_grad_()
    loss, _ = tk.branch_loss(leaf, case.velocity_old, case.advantages, case.terms, case.key)
    (65536.0 * loss).backward()
    assert leaf.grad.dtype == torch.bfloat16 and torch.isfinite(leaf.grad).all() and leaf.grad.abs().max() > 0
    with pytest.raises(ValueError, match="velocity_old: found device cpu"):
        tk.log_ratio(leaf, case.velocity_old.cpu(), case.coef, case.key, 3)


@pytest.mark.parametrize("mode", MODES)
def test_repeats_and_graph_replays(mode):
    from half_hour.kernel_checks import repeats_are_equal, replays_follow

    repeats_are_equal(Case(shape=(16, 64, 64), siblings=6, device="cuda"), mode, 100)
    replays_follow("cuda", mode)
