"""The drop-ins for TempFlow-GRPO's own functions against the published formula in float64."""

import inspect
import math

import pytest
import torch
from published_steps import SIGMAS, Scheduler, expected_step, timesteps
from tempflow_kernels.compat import tempflow_grpo
from tempflow_kernels.compat.tempflow_grpo import sde_step_with_logprob, sde_step_with_logprob_perstep


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(2)


def inputs(*shape):
    return [torch.randn(*shape) for _ in range(3)]


@pytest.mark.parametrize("level", [0.7, 0.9])
def test_training_line(level, monkeypatch):
    """As its train scripts call it: log_prob of given latents; in the fourth place std * sqrt(dt), not std."""
    monkeypatch.setattr(tempflow_grpo, "NOISE_LEVEL", level)
    sample, velocity, following = inputs(3, 4, 6, 5)
    index, leaf, double = [0, 3, 8], velocity.clone().requires_grad_(), velocity.double().requires_grad_()
    found = sde_step_with_logprob(Scheduler(), leaf, timesteps(index), sample, prev_sample=following, determistic=False)
    prev_sample, log_prob, mean, scale = found
    assert torch.equal(prev_sample, following) and scale.shape == (3, 1, 1, 1)
    expected = expected_step("sde", index, sample, double, level, following)
    for row, (row_mean, _, row_scale, row_log_prob) in enumerate(expected):
        torch.testing.assert_close(mean[row].double(), row_mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(log_prob[row].double(), row_log_prob, rtol=1e-5, atol=1e-5)
        assert float(scale[row]) == pytest.approx(row_scale, rel=1e-6)
    (log_prob.sum() + mean.sum()).backward()
    sum(row[3] + row[0].sum() for row in expected).backward()
    torch.testing.assert_close(leaf.grad.double(), double.grad, rtol=1e-4, atol=1e-5)


def test_sampling_line():
    """One timestep for the batch, drawn."""
    sample, velocity, _ = inputs(2, 4, 32, 32)
    found = sde_step_with_logprob(Scheduler(), velocity.bfloat16(), timesteps([5]), sample)
    assert found[3].shape == (1, 1, 1, 1) and found[0].dtype == torch.float32
    expected = expected_step("sde", [5, 5], sample, velocity.bfloat16(), 0.7, found[0])
    for row, (mean, _, scale, log_prob) in enumerate(expected):
        noise = (found[0][row].double() - mean) / scale
        assert abs(noise.mean()) < 0.08 and abs(noise.std() - 1) < 0.06
        torch.testing.assert_close(found[1][row].double(), log_prob, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("step", [sde_step_with_logprob, sde_step_with_logprob_perstep])
@pytest.mark.parametrize("times", [1, 2])
def test_deterministic_is_the_step_of_the_ode(step, times):
    """And its log_prob that of the ODE's point under the SDE."""
    sample, velocity, _ = inputs(2, 4, 6)
    index = [6, 6]
    found, log_prob, mean, scale = step(
        Scheduler(), velocity, timesteps(index[:times]), sample, determistic=True
    )  # fmt: skip
    euler = sample.double() + float(SIGMAS[7] - SIGMAS[6]) * velocity.double()
    torch.testing.assert_close(found.double(), euler, rtol=1e-6, atol=1e-6)
    for row, (row_mean, _, row_scale, row_log_prob) in enumerate(
        expected_step("sde", index, sample, velocity, 0.7, euler)
    ):
        torch.testing.assert_close(mean[row].double(), row_mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(log_prob[row].double(), row_log_prob, rtol=1e-5, atol=1e-5)
        assert float(scale.expand(2, 1, 1)[row]) == pytest.approx(row_scale, rel=1e-6)
    assert scale.shape == (times, 1, 1)


def test_deterministic_replaces_a_given_sample():
    sample, velocity, following = inputs(2, 4, 6)
    arguments = (Scheduler(), velocity, timesteps([6]), sample)
    found = sde_step_with_logprob(*arguments, following, determistic=True)
    assert torch.equal(found[0], sde_step_with_logprob(*arguments, determistic=True)[0])


def test_perstep_draws_six_siblings_of_every_row():
    """Siblings side by side, each with noise of its own, as `repeat_interleave` lays them."""
    sample, velocity, _ = inputs(2, 4, 16, 16)
    leaf = velocity.clone().requires_grad_()
    found, log_prob, mean, scale = sde_step_with_logprob_perstep(
        Scheduler(), leaf, timesteps([2]), sample, generator=torch.Generator().manual_seed(4)
    )
    assert found.shape == mean.shape == (12, 4, 16, 16) and log_prob.shape == (12,) and scale.shape == (1, 1, 1, 1)
    double = velocity.double().requires_grad_()
    copies = [tensor.repeat_interleave(6, 0) for tensor in (sample, double)]
    expected = expected_step("sde", [2] * 12, *copies, 0.7, found)
    noises = []
    for row, (row_mean, _, row_scale, row_log_prob) in enumerate(expected):
        torch.testing.assert_close(mean[row].double(), row_mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(log_prob[row].double(), row_log_prob, rtol=1e-5, atol=1e-5)
        noises.append(((found[row].double() - row_mean.detach()) / row_scale).flatten())
    correlation = torch.corrcoef(torch.stack(noises)) - torch.eye(12)
    assert correlation.abs().max() < 5 / math.sqrt(1024)
    log_prob.sum().backward()
    sum(row[3] for row in expected).backward()
    torch.testing.assert_close(leaf.grad.double(), double.grad, rtol=1e-4, atol=1e-5)


def test_signatures_are_those_of_the_originals():
    for step in (sde_step_with_logprob, sde_step_with_logprob_perstep):
        parameters = inspect.signature(step).parameters
        assert list(parameters) == [
            "self",
            "model_output",
            "timestep",
            "sample",
            "prev_sample",
            "generator",
            "determistic",
        ]
        assert [p.default for p in parameters.values() if p.default is not p.empty] == [None, None, False]


WRONG_USE = [
    (
        sde_step_with_logprob,
        {"generator": torch.Generator(), "prev_sample": torch.zeros(2, 3)},
        "found both",
    ),
    (sde_step_with_logprob, {"prev_sample": 0.7}, "prev_sample: found float, expected a tensor"),
    (
        sde_step_with_logprob,
        {"timestep": timesteps([1, 2, 3])},
        "timestep: found 3 of them, expected one",
    ),
    (sde_step_with_logprob_perstep, {"prev_sample": torch.zeros(2, 3)}, "prev_sample: found a value, expected None"),
    (sde_step_with_logprob, {"noise_level": 0.7}, "noise_level: found a keyword that tempflow_grpo.sde_step_with_logp"),
    (sde_step_with_logprob, {"sde_type": "cps"}, "sde_type: found a keyword"),
]


@pytest.mark.parametrize(("step", "changes", "message"), WRONG_USE, ids=[row[2][:40] for row in WRONG_USE])
def test_wrong_use_is_one_line(step, changes, message):
    arguments = {"model_output": torch.zeros(2, 3), "timestep": timesteps([3]), "sample": torch.zeros(2, 3)}
    with pytest.raises((ValueError, TypeError)) as caught:
        step(Scheduler(), **(arguments | changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)
