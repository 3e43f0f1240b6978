"""The SDE tables against the papers' formulas, the models' own schedulers and the Gaussian marginals they must keep."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tempflow.common.errors import BadInput
from tempflow.explore.schedule import TRANSITIONS, build_schedule, cps, dance_sde, flash_sde, flow_sde, ode


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


def test_weights_of_a_subset_have_mean_one_too():
    schedule = build_schedule(sd3_sigmas(10), "flow_sde", 0.7)
    std = schedule.sde.std[[1, 5]]
    assert torch.allclose(schedule.noise_weights([1, 5]), 2 * std / std.sum(), rtol=1e-14)


def random_sigmas(steps: int = 7) -> torch.Tensor:
    seed = torch.Generator().manual_seed(steps)
    inner = torch.rand(steps - 1, dtype=torch.float64, generator=seed).sort(descending=True).values * 0.98 + 0.01
    return torch.cat((torch.ones(1), inner, torch.zeros(1)))


def published(kind: str, level: float, s, following, second, x, v):
    """Mean and std of one step as each paper writes it. second: the schedule's second sigma."""
    dt, data, noise = following - s, x - s * v, x + (1 - s) * v
    if kind == "cps":
        std = following * math.sin(level * math.pi / 2)
        kept = following * math.cos(level * math.pi / 2)  # sqrt(s'^2 - std^2) >= 0
        return (1 - following) * data + abs(kept) * noise, abs(std)
    g = {"flow_sde": level * math.sqrt(s / (1 - (second if s == 1 else s))), "dance_sde": level,
         "flash_sde": level * s * second}[kind]  # fmt: skip
    score = -(x - (1 - s) * data) / s**2
    return x + (v - 0.5 * g**2 * score) * dt, g * math.sqrt(-dt)


LEVELS = [("flow_sde", 0.7), ("dance_sde", 0.3), ("flash_sde", 1.0), ("flash_sde", 0.4), ("cps", 0.8), ("cps", 1.0),
          ("cps", 1.3), ("cps", 1.9)]  # fmt: skip
JUMPS = {"single steps": None, "merged steps": [1, 3, 1, 2, 3, 2, 1]}


@pytest.mark.parametrize("jumps", JUMPS)
@pytest.mark.parametrize(("kind", "level"), LEVELS)
def test_steps_are_the_published_ones(kind, level, jumps):
    """At random points in float64; a merged step is one of the same formula that goes further."""
    sigmas, (x, v) = random_sigmas(), (0.83, -1.27)
    schedule = build_schedule(sigmas, kind, level, JUMPS[jumps])
    for step, reach in enumerate(JUMPS[jumps] or [1] * 7):
        s, following = sigmas[step].item(), sigmas[step + reach].item()
        mean, std = published(kind, level, s, following, sigmas[1].item(), x, v)
        found = schedule.sde.x_coef[step] * x + schedule.sde.v_coef[step] * v
        assert found.item() == pytest.approx(mean, rel=1e-12, abs=1e-12)
        assert schedule.sde.std[step].item() == pytest.approx(std, rel=1e-12, abs=1e-15)
        assert schedule.step_sizes()[step].item() == pytest.approx(s - following, rel=1e-14)
    assert torch.equal(schedule.ode.v_coef, sigmas[1:] - sigmas[:-1]) and not schedule.ode.std.any()
    assert torch.equal(schedule.ode.x_coef, torch.ones(7))


@pytest.mark.parametrize("kind", TRANSITIONS)
def test_a_list_gives_each_step_the_coefficients_of_its_own_level(kind):
    sigmas, levels, jumps = random_sigmas(), [0.9, 0.4, 0.7, 1.1, 0.2, 0.6], JUMPS["merged steps"]
    listed = build_schedule(sigmas, kind, levels, jumps).sde
    for step, level in enumerate([*levels, levels[-1]]):
        alone = build_schedule(sigmas, kind, level, jumps).sde
        for column in ("x_coef", "v_coef", "std"):
            assert getattr(listed, column)[step] == getattr(alone, column)[step], (step, column)


def test_transitions_by_themselves_take_single_steps():
    sigmas = random_sigmas()
    for name, transition in (("flow_sde", flow_sde), ("dance_sde", dance_sde), ("flash_sde", flash_sde), ("cps", cps)):
        alone, within = transition(sigmas, 0.6), build_schedule(sigmas, name, 0.6).sde
        assert torch.equal(alone.v_coef, within.v_coef) and torch.equal(alone.std, within.std)
    assert torch.equal(ode(sigmas).v_coef, build_schedule(sigmas, "cps", 0.6).ode.v_coef)


def test_cps_replaces_all_noise_at_level_one():
    """There the step forgets the predicted noise; on both sides of it the same share of noise is kept."""
    sigmas, sizes = random_sigmas(), []
    whole = cps(sigmas, 1.0)
    assert torch.allclose(whole.std, sigmas[1:]) and torch.allclose(whole.x_coef, 1 - sigmas[1:])
    for level in (0.7, 1.3):
        sizes.append(cps(sigmas, level))
    assert torch.allclose(sizes[0].std, sizes[1].std) and torch.allclose(sizes[0].v_coef, sizes[1].v_coef)


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
    steps = torch.tensor([0, 2, 2, 8, 5])
    coef = schedule.sde.coef(steps)
    assert coef.shape == (5, 3) and coef.dtype == torch.float32 and coef.is_contiguous()
    for row, step in zip(coef.tolist(), steps.tolist(), strict=True):
        expected = [schedule.sde.x_coef[step], schedule.sde.v_coef[step], schedule.sde.std[step]]
        assert row == pytest.approx([value.item() for value in expected], rel=1e-7)
    assert torch.equal(schedule.sigma_rows(steps), schedule.sigmas[steps].float())


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (((1, 0.5, 0), "langevin", 0.7), "sample.transition"),
        (((1, 0.5, 0), "flow_sde", 0.0), "sample.noise_level"),
        (((1, 0.5, 0), "flow_sde", -0.1), "sample.noise_level"),
        (((1, 0.5, 0), "cps", 2.0), "sample.noise_level"),
        (((1, 0.5, 0), "cps", 2.5), "sample.noise_level"),
        (((1, 0.5, 0.2, 0), "flow_sde", [0.7]), "sample.noise_level"),
        (((1, 0.5, 0.2, 0), "flow_sde", [0.7, 0.7, 0.7]), "sample.noise_level"),
        (((1, 0.5, 0.2, 0), "flow_sde", [0.7, 0.0]), "sample.noise_level"),
        (((1, 0.5, 0.2, 0), "cps", [0.7, 2.0]), "sample.noise_level"),
        (((1.2, 0.5, 0), "flow_sde", 0.7), "sample.steps"),
        (((1, 0.5, 0.5, 0), "flow_sde", 0.7), "sample.steps"),
        (((1, 0.5, 0.6, 0), "flow_sde", 0.7), "sample.steps"),
        (((1, 0.5, 0.1), "flow_sde", 0.7), "sample.steps"),
    ],
)
def test_impossible_schedules_are_refused(arguments, field):
    with pytest.raises(BadInput) as caught:
        build_schedule(*arguments)
    assert caught.value.field == field
