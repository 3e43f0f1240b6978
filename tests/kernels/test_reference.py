"""The plain-torch definition of the operators against independent float64 computations."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import Case, oracle_log_ratio, oracle_loss, oracle_noise, oracle_step
from kernel_contract import CASES, check_log_prob, check_log_ratio, check_loss, check_nan, unnumbered
from tempflow_kernels.plain import gradients, reference
from tempflow_kernels.plain import ops as reference_ops

DOUBLE_CASES = [
    Case(dtype=torch.float64, stored_noise=True, optional=()),
    Case(dtype=torch.float64, stored_noise=True, distance=1.0),
    Case(dtype=torch.float64, optional=("velocity_ref",)),
    *(Case(shape=(5, 9), dtype=torch.float64, method=method, seed=22) for method in ("guard", "cps", "free")),
]


def close(found, expected, tolerance=1e-12):
    assert (found - expected).abs().max() <= tolerance * (1 + expected.abs().max())


@pytest.mark.parametrize("case", DOUBLE_CASES, ids=str)
def test_float64_loss_and_gradients_equal_the_textbook_objective(case):
    noise = reference.normal_like(case.latents, case.key, case.siblings).double() if case.noise is None else case.noise
    loss, stats, gradient = oracle_loss(case, noise)
    leaf = case.velocity.clone().requires_grad_()
    branches, *others = case.loss_arguments
    found, found_stats = reference.branch_loss(branches._replace(velocity=leaf), *others)
    found.backward()
    close(found.detach(), loss)
    close(found_stats.table.double(), stats, 1e-11)
    close(leaf.grad, gradient)


def test_float64_step_and_ratio():
    case = Case(dtype=torch.float64, optional=("velocity_uncond",))
    noise = reference.normal_like(case.latents, case.key, case.siblings).double()
    following, log_prob = reference.transition_step(
        case.latents, case.velocity, case.coef, case.key, case.siblings, case.velocity_uncond, case.guidance
    )
    close(following, oracle_step(case, noise)[0])
    close(log_prob, oracle_step(case, noise)[1])
    ratios = reference.log_ratio(case.ratio_branches, case.siblings)
    close(ratios, oracle_log_ratio(case, noise, case.velocity.unsqueeze(1)))
    old_step = reference.transition_step(case.latents, case.velocity_old, case.coef, case.key, case.siblings)[0]
    difference = reference.transition_log_prob(
        old_step, case.latents, case.velocity, case.coef
    ) - reference.transition_log_prob(old_step, case.latents, case.velocity_old, case.coef)
    close(difference, ratios, 1e-11)


def test_slopes_are_the_derivative_of_the_objective():
    log_ratios = torch.linspace(-0.4, 0.4, 40, dtype=torch.float64).view(4, 10).requires_grad_()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    gain = torch.linspace(-1, 1, 40, dtype=torch.float64)[order].view(4, 10)
    gain[0, 0] = 0.0
    reference.clipped_objective(log_ratios, gain, 0.2, 0.1).backward()
    close(gradients.branch_slopes(log_ratios.detach(), gain, 0.2, 0.1), log_ratios.grad)


def test_log_ratio_error_at_262144_elements_is_below_1e_8():
    case = Case(shape=(16, 128, 128), rows=3, siblings=2, stored_noise=True, distance=1e-3)
    oracle = oracle_log_ratio(case, case.noise.double(), case.velocity.double().unsqueeze(1))
    found = reference_ops.log_ratio(case.ratio_branches, case.siblings)
    assert (found.double() - oracle).abs().max() < 1e-8


@pytest.mark.parametrize("case", CASES, ids=str)
def test_analytic_gradients_meet_the_contract_of_the_backends(case):
    check_log_prob(reference_ops, case)
    check_log_ratio(reference_ops, case)
    check_loss(reference_ops, case, scale=3.0)


def test_nan_is_not_clipped_away():
    check_nan(reference_ops, Case())


def test_noise_of_the_reference_is_within_a_few_ulp_of_the_oracle():
    for case in map(unnumbered, CASES):
        found, oracle = reference_ops.normal(case.key, case.siblings, case.elements), oracle_noise(case).flatten(2)
        assert (found.double() - oracle).abs().max() < 6e-7


def test_the_public_loss_through_the_autograd_class_of_gpus():
    """test_loss.py in a process where plain torch serves the CPU: the gradient comes from `BranchLoss`."""
    suite = Path(__file__).with_name("test_loss.py")
    environment = os.environ | {
        "TEMPFLOW_KERNELS_BACKEND": "reference", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", suite]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=suite.parents[2])
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-6000:] + run.stderr[-2000:]
