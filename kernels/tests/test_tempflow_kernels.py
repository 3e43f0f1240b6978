"""The installed kernel through its public names only: on every device there is, against formulas written out here."""

import math

import pytest
import tempflow_kernels as tk
import torch

ROWS, SIBLINGS, SHAPE = 3, 4, (4, 9, 7)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
pytestmark = pytest.mark.kernels_ci


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA or ROCm device")
    return request.param


@pytest.fixture
def given(device):
    """latents, velocity, the velocity of the drawing policy, coefficients per row, keys."""
    latents, velocity, velocity_old = (torch.randn(ROWS, *SHAPE, device=device) for _ in range(3))
    coef = torch.tensor([[0.98, -0.05, 0.3], [0.9, -0.2, 0.7], [1.0, -0.1, 0.5]], device=device)
    key = torch.tensor([[42, 0], [7, 64], [2**40 + 1, 0]], device=device)
    return latents, velocity, velocity_old, coef, key


def per_row(values):
    """(R,) to (R, 1, 1, 1, 1): beside siblings and elements."""
    return values.double()[:, None, None, None, None]


def mean_of_step(latents, velocity, coef):
    return per_row(coef[:, 0]) * latents.double()[:, None] + per_row(coef[:, 1]) * velocity.double()[:, None]


def mean_square(values):
    return values.square().flatten(2).mean(2)


def test_step_adds_the_noise_of_the_key(given):
    latents, velocity, _, coef, key = given
    following, log_prob = tk.transition_step(latents, velocity, coef, key, SIBLINGS)
    noise = tk.normal_like(latents, key, SIBLINGS)
    assert following.shape == (ROWS, SIBLINGS, *SHAPE)
    expected = mean_of_step(latents, velocity, coef) + per_row(coef[:, 2]) * noise.double()
    torch.testing.assert_close(following.double(), expected, rtol=1e-5, atol=1e-5)
    constant = coef[:, 2:].double().log() + 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(log_prob.double(), -0.5 * mean_square(noise.double()) - constant, rtol=1e-4, atol=1e-5)


def test_log_ratio_is_the_difference_of_log_probabilities(given):
    latents, velocity, velocity_old, coef, key = given
    following, _ = tk.transition_step(latents, velocity_old, coef, key, SIBLINGS)
    found = tk.log_ratio(velocity, velocity_old, coef, key, SIBLINGS)
    old, new = (
        mean_square((following.double() - mean_of_step(latents, policy, coef)) / per_row(coef[:, 2]))
        for policy in (velocity_old, velocity)
    )
    torch.testing.assert_close(found.double(), 0.5 * (old - new), rtol=1e-4, atol=1e-5)


def test_loss_and_gradient_are_those_of_autograd(given):
    _, velocity, velocity_old, coef, key = given
    advantages = torch.randn(ROWS, SIBLINGS, device=velocity.device)
    velocity.requires_grad_()
    loss, _ = tk.branch_loss(velocity, velocity_old, advantages, tk.gaussian_terms(coef), key, clip_range=(0.2, 0.2))
    (found,) = torch.autograd.grad(loss, velocity)
    ratio = tk.log_ratio(velocity, velocity_old, coef, key, SIBLINGS).exp()
    expected = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, torch.autograd.grad(expected, velocity)[0], rtol=1e-4, atol=1e-6)


def test_equal_keys_draw_equal_noise_on_every_device(given):
    latents, key = given[0], given[4]
    here, host = tk.normal_like(latents, key, SIBLINGS).cpu(), tk.normal_like(latents.cpu(), key.cpu(), SIBLINGS)
    torch.testing.assert_close(here, host, rtol=0, atol=1e-4)  # fast noise differs by at most 1e-5
    assert abs(host.mean()) < 0.1 and abs(host.std() - 1) < 0.1
