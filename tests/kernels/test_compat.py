"""The drop-in functions against an independent statement of the formulas of the functions they replace."""

import inspect
import math

import pytest
import torch
from tempflow_kernels.compat.dance_grpo import flux_step
from tempflow_kernels.compat.flow_grpo import sde_step_with_logprob
from torch.distributions import Normal

SIGMAS = torch.tensor([1.0, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.278, 0.0089, 0.0])


class Scheduler:
    """What the function asks of a diffusers scheduler."""

    sigmas = SIGMAS

    def index_for_timestep(self, timestep):
        return int((self.sigmas - float(timestep) / 1000).abs().argmin())


def expected_flow_grpo(kind, index, sample, velocity, level, following):
    """mean, std_dev_t, noise scale, log_prob in float64 from the published formulas, sample by sample."""
    rows = []
    for i, x, v, nxt in zip(index, sample.double(), velocity.double(), following.double(), strict=True):
        s, s_next, s_first = (float(SIGMAS[k]) for k in (i, i + 1, 1))
        if kind == "sde":
            g = level * math.sqrt(s / (1 - (s_first if s == 1 else s)))
            score = -(x + (1 - s) * v) / s
            mean, std = x - (v - 0.5 * g**2 * score) * (s - s_next), g
            scale = g * math.sqrt(s - s_next)
            log_prob = Normal(mean, scale).log_prob(nxt).mean()
        else:
            std = scale = s_next * math.sin(level * math.pi / 2)
            data, noise = x - s * v, x + (1 - s) * v
            mean = (1 - s_next) * data + math.sqrt(s_next**2 - scale**2) * noise
            log_prob = -(nxt - mean).square().mean()
        rows.append((mean, std, scale, log_prob))
    return rows


@pytest.mark.parametrize("kind", ["sde", "cps"])
@pytest.mark.parametrize("shape", [(4, 8, 8), (16, 12)])
def test_flow_grpo_step_with_given_next_sample(kind, shape):
    torch.manual_seed(1)
    index = [0, 3, 8]
    sample, velocity, following = (torch.randn(3, *shape) for _ in range(3))
    leaf = velocity.clone().requires_grad_()
    arguments = (Scheduler(), leaf, SIGMAS[index] * 1000, sample)
    found = sde_step_with_logprob(*arguments, 0.7, following, sde_type=kind, return_sqrt_dt=True)
    prev_sample, log_prob, mean, std_dev_t, sqrt_dt = found
    double = velocity.double().requires_grad_()
    expected = expected_flow_grpo(kind, index, sample, double, 0.7, following)
    assert torch.equal(prev_sample, following)
    for row, (row_mean, std, _, row_log_prob) in enumerate(expected):
        torch.testing.assert_close(mean[row].double(), row_mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(log_prob[row].double(), row_log_prob, rtol=1e-5, atol=1e-5)
        assert float(std_dev_t[row]) == pytest.approx(std, rel=1e-6)
        step = float(SIGMAS[index[row]] - SIGMAS[index[row] + 1])
        assert float(sqrt_dt[row]) == pytest.approx(math.sqrt(step), rel=1e-5)
    assert std_dev_t.shape == sqrt_dt.shape == (3, *[1] * len(shape)) and log_prob.shape == (3,)
    (log_prob.sum() + mean.sum()).backward()
    sum(row[3] + row[0].sum() for row in expected).backward()
    torch.testing.assert_close(leaf.grad.double(), double.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_flow_grpo_step_that_draws(kind):
    sample, velocity = torch.randn(2, 4, 64, 64), torch.randn(2, 4, 64, 64).bfloat16()
    index = [2, 5]

    def step(seed):
        generator = torch.Generator().manual_seed(seed)
        return sde_step_with_logprob(
            Scheduler(), velocity, SIGMAS[index] * 1000, sample, generator=generator, sde_type=kind
        )  # fmt: skip

    first, again, other = step(5), step(5), step(6)
    assert len(first) == 4 and first[0].dtype == torch.float32
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    expected = expected_flow_grpo(kind, index, sample, velocity, 0.7, first[0])
    for row, (mean, _, scale, log_prob) in enumerate(expected):
        noise = (first[0][row].double() - mean) / scale
        assert abs(noise.mean()) < 0.04 and abs(noise.std() - 1) < 0.03
        torch.testing.assert_close(first[1][row].double(), log_prob, rtol=1e-5, atol=1e-5)
    assert not torch.equal(first[0][0] - first[2][0], first[0][1] - first[2][1])


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_flow_grpo_step_that_draws_is_differentiable(kind):
    """As if the drawn sample had been given: log_prob and mean reach the velocity, and have the same values."""
    sample, velocity = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    timesteps, leaves = SIGMAS[[2, 5]] * 1000, [velocity.clone().requires_grad_() for _ in range(2)]
    drawn = sde_step_with_logprob(Scheduler(), leaves[0], timesteps, sample, sde_type=kind)
    assert not drawn[0].requires_grad
    given = sde_step_with_logprob(Scheduler(), leaves[1], timesteps, sample, 0.7, drawn[0], sde_type=kind)
    for found, expected in zip(drawn[:3], given[:3], strict=True):
        torch.testing.assert_close(found, expected)
    for result in (drawn, given):
        (result[1].sum() + result[2].square().sum()).backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)
    log_prob = sde_step_with_logprob(Scheduler(), velocity, timesteps, sample, sde_type=kind)[1]
    assert log_prob.shape == (2,) and not log_prob.requires_grad


def test_flow_grpo_deterministic_steps_have_a_finite_log_prob():
    sample, velocity = torch.randn(1, 4, 4), torch.randn(1, 4, 4)
    for kind, index, level in (("cps", 9, 0.7), ("cps", 3, 0.0), ("sde", 3, 0.0)):
        found = sde_step_with_logprob(Scheduler(), velocity, SIGMAS[[index]] * 1000, sample, level, sde_type=kind)
        torch.testing.assert_close(found[0], found[2])
        assert float(found[1]) == pytest.approx(0.0, abs=1e-6)


def test_flow_grpo_signature_and_unknown_kind():
    parameters = inspect.signature(sde_step_with_logprob).parameters
    assert list(parameters) == [
        "self", "model_output", "timestep", "sample", "noise_level", "prev_sample", "generator", "sde_type",
        "return_sqrt_dt",
    ]  # fmt: skip
    defaults = [parameter.default for parameter in parameters.values()][4:]
    assert defaults == [0.7, None, None, "sde", False]
    with pytest.raises(ValueError, match="sde_type: found 'ode', expected one of sde, cps"):
        sde_step_with_logprob(Scheduler(), torch.zeros(1, 2), [1000.0], torch.zeros(1, 2), sde_type="ode")


@pytest.mark.parametrize("sde_solver", [True, False])
def test_dance_grpo_step(sde_solver):
    torch.manual_seed(2)
    x, v, following, eta, index = torch.randn(2, 6, 4), torch.randn(2, 6, 4), torch.randn(2, 6, 4), 0.3, 4
    s, s_next = (SIGMAS[index + k].double() for k in (0, 1))
    leaf, double = v.clone().requires_grad_(), v.double().requires_grad_()
    data = x.double() - s * double
    mean = x.double() - (s - s_next) * double
    if sde_solver:
        score = -(x.double() - (1 - s) * data) / s**2
        mean = mean + 0.5 * eta**2 * score * (s - s_next)
    std = eta * math.sqrt(s - s_next)
    expected = (-(following.double() - mean).square() / (2 * std**2)).mean((1, 2))
    found, original, log_prob = flux_step(leaf, x, eta, SIGMAS, index, following, True, sde_solver)
    assert torch.equal(found, following)
    torch.testing.assert_close(original.double(), data, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_prob.double(), expected, rtol=1e-5, atol=1e-5)
    log_prob.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(leaf.grad.double(), double.grad, rtol=1e-4, atol=1e-5)
    deterministic, again = flux_step(v, x, eta, SIGMAS, index, None, False, sde_solver)
    torch.testing.assert_close(deterministic.double(), mean.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(again, original)


def test_dance_grpo_step_that_draws():
    x, v = torch.randn(2, 64, 64), torch.randn(2, 64, 64)
    drawn, _, log_prob = flux_step(v, x, 0.3, SIGMAS, 4, None, True, True)
    mean, _ = flux_step(v, x, 0.3, SIGMAS, 4, None, False, True)
    noise = (drawn - mean) / (0.3 * math.sqrt(float(SIGMAS[4] - SIGMAS[5])))
    assert abs(noise.mean()) < 0.06 and abs(noise.std() - 1) < 0.04
    torch.testing.assert_close(log_prob, -0.5 * noise.square().mean((1, 2)), rtol=1e-3, atol=1e-3)
    assert list(inspect.signature(flux_step).parameters) == [
        "model_output", "latents", "eta", "sigmas", "index", "prev_sample", "grpo", "sde_solver",
    ]  # fmt: skip
