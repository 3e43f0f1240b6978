"""The SDE tables against the papers' formulas, the models' own schedulers and the Gaussian marginals they must keep."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tempflow.common.errors import BadInput
from tempflow.explore.schedule import TRANSITIONS, build_schedule, cps, dance_sde, flow_sde, ode


def sd3_sigmas(steps: int) -> torch.Tensor:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.double()


def shifted_sigmas(steps: int, tokens: int, most_tokens: int, most_shift: float, terminal: float | None):
    """FLUX and Qwen-Image: linear sigmas, exponential dynamic shift growing with the number of image tokens."""
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=most_shift, base_image_seq_len=256,
        max_image_seq_len=most_tokens, shift_terminal=terminal,
    )  # fmt: skip
    mu = 0.5 + (most_shift - 0.5) * (tokens - 256) / (most_tokens - 256)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).numpy(), mu=mu)
    return scheduler.sigmas.double()


RELEASED = {
    "SD3.5": (sd3_sigmas(10), 0.7, 2.25),
    "FLUX 1024 px": (shifted_sigmas(10, 4096, 4096, 1.15, None), 0.9, 1.73),
    "Qwen-Image 512 px": (shifted_sigmas(10, 1024, 8192, 0.9, 0.02), 1.2, 1.53),
}


@pytest.mark.parametrize("model", RELEASED)
def test_released_constants_are_one_over_the_mean_std_of_their_schedules(model):
    sigmas, level, constant = RELEASED[model]
    std = build_schedule(sigmas, "flow_sde", level).sde.std[:9]
    assert 1 / std.mean().item() == pytest.approx(constant, abs=0.005)


def test_sd35_table_of_the_paper_code():
    schedule = build_schedule(sd3_sigmas(10), "flow_sde", 0.7)
    expected = [0.700, 0.743, 0.536, 0.446, 0.392, 0.353, 0.319, 0.282, 0.225]
    assert schedule.sde.std[:9].tolist() == pytest.approx(expected, abs=6e-4)
    weights = schedule.noise_weights(range(9))
    assert weights.tolist() == pytest.approx([1.577, 1.673, 1.208, 1.004, 0.882, 0.795, 0.719, 0.635, 0.508], abs=1e-3)
    assert weights.mean().item() == pytest.approx(1, abs=1e-12)


def test_weights_of_a_subset_keep_the_mean_of_the_trained_steps():
    schedule = build_schedule(sd3_sigmas(10), "flow_sde", 0.7)
    everything = schedule.noise_weights(range(9))
    assert torch.equal(schedule.noise_weights([1, 5], range(9)), everything[[1, 5]])
    assert schedule.noise_weights([1, 5]).mean().item() == pytest.approx(1, abs=1e-12)


def random_sigmas(steps: int = 7) -> torch.Tensor:
    inner = torch.rand(steps - 1, dtype=torch.float64).sort(descending=True).values * 0.98 + 0.01
    return torch.cat((torch.ones(1), inner, torch.zeros(1)))


def test_steps_are_the_published_ones():
    """Mean and standard deviation as each paper writes them, at random points."""
    sigmas, x, v = random_sigmas(), torch.randn(1, dtype=torch.float64), torch.randn(1, dtype=torch.float64)
    s, following = sigmas[:-1], sigmas[1:]
    dt = following - s

    def mean(transition):
        return transition.x_coef * x + transition.v_coef * v

    assert torch.allclose(mean(ode(sigmas)), x + dt * v, rtol=0, atol=1e-14)

    flow, level = flow_sde(sigmas, 0.7), 0.7
    g = level * torch.sqrt(s / (1 - torch.where(s == 1, sigmas[1], s)))
    published = x * (1 + g**2 / (2 * s) * dt) + v * (1 + g**2 * (1 - s) / (2 * s)) * dt
    assert torch.allclose(mean(flow), published, rtol=1e-12, atol=1e-12)
    assert torch.allclose(flow.std, g * torch.sqrt(-dt), rtol=1e-12)

    eta, dance = 0.3, dance_sde(sigmas, 0.3)
    data = x - s * v
    score = -(x - (1 - s) * data) / s**2
    assert torch.allclose(mean(dance), x + (v - 0.5 * eta**2 * score) * dt, rtol=1e-12, atol=1e-12)
    assert torch.allclose(dance.std, eta * torch.sqrt(-dt), rtol=1e-12)

    kept, data, noise = cps(sigmas, 0.8), x - s * v, x + (1 - s) * v
    std = following * math.sin(0.8 * math.pi / 2)
    published = (1 - following) * data + torch.sqrt(following**2 - std**2) * noise
    assert torch.allclose(mean(kept), published, rtol=1e-12, atol=1e-12)
    assert torch.allclose(kept.std, std, rtol=1e-12)


@pytest.mark.parametrize("kind", TRANSITIONS)
def test_stochastic_steps_keep_the_marginals_of_the_flow(kind):
    """Data at one point mu: the marginal is N((1-s) mu, s^2) and v = (x - mu) / s, affine in x, so mean and variance
    pass through the coefficients exactly. With many steps they must follow the flow's own."""
    sigmas = torch.linspace(1, 0, 4001, dtype=torch.float64)
    transition, mu = TRANSITIONS[kind](sigmas, 0.4), 1.5
    mean, variance = torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    for step in range(3000):
        slope = transition.v_coef[step] / sigmas[step]
        gain = transition.x_coef[step] + slope
        mean, variance = gain * mean - slope * mu, gain**2 * variance + transition.std[step] ** 2
    sigma = sigmas[3000]
    assert mean.item() == pytest.approx(((1 - sigma) * mu).item(), abs=2e-3)
    assert variance.sqrt().item() == pytest.approx(sigma.item(), abs=2e-3)


def test_coef_rows_are_what_operators_take(schedule):
    coef = schedule.sde.coef(2, 5)
    assert coef.shape == (5, 3) and coef.dtype == torch.float32 and coef.is_contiguous()
    expected = [schedule.sde.x_coef[2], schedule.sde.v_coef[2], schedule.sde.std[2]]
    assert coef[4].tolist() == pytest.approx([value.item() for value in expected], rel=1e-7)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (((1, 0.5, 0), "langevin", 0.7), "sample.transition"),
        (((1, 0.5, 0), "flow_sde", 0.0), "sample.noise_level"),
        (((1, 0.5, 0), "cps", 1.5), "sample.noise_level"),
        (((1, 0.5, 0.6, 0), "flow_sde", 0.7), "sample.steps"),
        (((1, 0.5, 0.1), "flow_sde", 0.7), "sample.steps"),
    ],
)
def test_impossible_schedules_are_refused(arguments, field):
    with pytest.raises(BadInput) as caught:
        build_schedule(*arguments)
    assert caught.value.field == field
