"""The public loss and its terms on whatever backend serves the CPU, against float64 computations.

Run as it is (the C++ twin, where it is built), and again by test_reference.py and test_triton.py with plain torch and
with Triton in its interpreter: these two go through the autograd class that GPUs use.
"""

import pytest
import tempflow_kernels as tk
import torch
from kernel_cases import Case, oracle_loss, oracle_noise

CASE = Case()


def loss_call(case, **changes):
    names = ("velocity", "velocity_old", "advantages", "terms", "key", "noise", "velocity_ref", "kl_coef", "clip_range")
    return tk.branch_loss(**({name: getattr(case, name) for name in names} | changes))


def test_the_autograd_class_is_that_of_the_backend():
    """Only the C++ twin finishes the gradient in the forward; all others go the way of the GPU."""
    loss, _ = loss_call(CASE, velocity=CASE.velocity.clone().requires_grad_())
    native = tk.backend_info()["cpu"] == "native"
    assert type(loss.grad_fn).__name__ == ("BranchLossAtOnceBackward" if native else "BranchLossBackward")


@pytest.mark.parametrize("scale", [1.0, 65536.0])
@pytest.mark.parametrize("method", ["gaussian", "guard", "cps", "free"])
def test_gradient_of_the_public_loss(scale, method):
    case = Case(method=method, seed=30)
    leaf = case.velocity.clone().requires_grad_()
    loss, stats = loss_call(case, velocity=leaf)
    (scale * loss).backward()
    expected, expected_stats, gradient = oracle_loss(case, oracle_noise(case))
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(stats.table.double(), expected_stats, rtol=1e-4, atol=1e-7)
    tolerance = 1e-5 * scale * float(gradient.abs().max())
    torch.testing.assert_close(leaf.grad.double(), scale * gradient, rtol=1e-4, atol=tolerance)


def test_float64_goes_through_the_reference_and_passes_gradcheck():
    """In everything that the loss is differentiable in, terms and advantages too."""
    case = Case(shape=(5,), dtype=torch.float64, stored_noise=True, clip_range=(10.0, 10.0), method="free")
    names = ("velocity", "velocity_old", "advantages", "terms", "noise", "velocity_ref")

    def loss(*leaves):
        return loss_call(case, **dict(zip(names, leaves, strict=True)))[0]

    leaves = [getattr(case, name).double().requires_grad_() for name in names]
    torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("name", ["velocity_old", "advantages", "terms", "noise", "velocity_ref"])
def test_no_gradient_of_the_loss_is_lost(name):
    """The fused operators know the gradient in velocity only; whoever asks for another still gets it, in fp32."""
    case = Case(stored_noise=True, clip_range=(10.0, 10.0), method="free")
    found, expected = getattr(case, name).clone().requires_grad_(), getattr(case, name).double().requires_grad_()
    for leaf in (found, expected):
        loss_call(case, **{name: leaf})[0].backward()
    size = float(expected.grad.abs().max())
    assert size > 0
    torch.testing.assert_close(found.grad.double(), expected.grad, rtol=1e-3, atol=1e-5 * size)


def test_gaussian_terms_are_rounded_once_from_float64():
    coef = torch.tensor([[0.9, -0.1, 0.3], [1.0, -0.1, 0.0], [0.8, -0.2, 0.7]])
    weights, kl_weights = torch.tensor([0.1, 2.0, 0.0]), torch.tensor([0.7, 3.0, 0.25])
    s = [float(row[1].double() / row[2].double()) if row[2] > 0 else 0.0 for row in coef]
    expected = torch.tensor([[float(w), x * x / 2, x, x * x / 2 * float(k)]
                             for w, k, x in zip(weights, kl_weights, s, strict=True)], dtype=torch.float64)  # fmt: skip
    found = tk.gaussian_terms(coef, weights, kl_weights)
    assert found.dtype == torch.float32 and torch.equal(found, expected.float())
    assert torch.equal(tk.gaussian_terms(coef.double(), weights, kl_weights), expected)
    plain = tk.gaussian_terms(coef)
    assert torch.equal(plain[:, 0], torch.ones(3)) and torch.equal(plain[:, 3], plain[:, 1])


def test_gaussian_terms_are_differentiable_where_a_step_is_deterministic():
    coef = CASE.coef.clone().requires_grad_()
    tk.gaussian_terms(coef).sum().backward()
    assert torch.isfinite(coef.grad).all() and not coef.grad[1].any() and coef.grad[0, 1] != 0


def test_ratio_max_is_the_largest_ratio():
    """Below 1 too: the velocity moved so that every ratio fell."""
    case = Case(stored_noise=True, siblings=1, method="free")
    terms = torch.tensor([[1.0, 0.5, 0.0, 0.0]]).repeat(4, 1)
    _, stats = loss_call(case, terms=terms)
    expected = torch.exp(-0.5 * (case.velocity - case.velocity_old).flatten(1).square().mean(1))
    assert expected.max() < 1
    torch.testing.assert_close(stats.ratio_max, expected.max(), rtol=0, atol=2e-7)
    torch.testing.assert_close(stats.ratio_mean, expected.mean(), rtol=0, atol=2e-7)


def test_rows_of_zeros_in_square_and_product_have_ratio_1():
    terms = CASE.terms * torch.tensor([[1.0], [1.0], [0.0], [1.0]])
    leaf = CASE.velocity.clone().requires_grad_()
    loss_call(CASE, velocity=leaf, terms=terms, kl_coef=0.0)[0].backward()
    assert not leaf.grad[1:3].any() and leaf.grad[0].abs().max() > 0
    quiet = loss_call(CASE, terms=torch.zeros(4, 4), kl_coef=0.0)
    assert float(quiet[0]) == 0 and float(quiet[1].ratio_max) == 1 and float(quiet[1].log_ratio_max) == 0
