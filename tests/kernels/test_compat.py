"""The drop-ins for Flow-GRPO, Flow-CPS and DanceGRPO against an independent float64 statement of their formulas."""

import inspect
import math

import pytest
import torch
from published_steps import SIGMAS, Scheduler, dance_step, expected_step, timesteps
from tempflow_kernels.compat import flow_cps
from tempflow_kernels.compat.dance_grpo import flux_step, flux_step_without_constants
from tempflow_kernels.compat.flow_grpo import sde_step_with_logprob


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


@pytest.mark.parametrize("kind", ["sde", "cps"])
@pytest.mark.parametrize("shape", [(4, 8, 8), (16, 12)])
def test_flow_grpo_step_with_given_next_sample(kind, shape):
    index = [0, 3, 8]
    sample, velocity, following = (torch.randn(3, *shape) for _ in range(3))
    leaf = velocity.clone().requires_grad_()
    arguments = (Scheduler(), leaf, timesteps(index), sample)
    found = sde_step_with_logprob(*arguments, 0.7, following, sde_type=kind, return_sqrt_dt=True)
    prev_sample, log_prob, mean, std_dev_t, sqrt_dt = found
    double = velocity.double().requires_grad_()
    expected = expected_step(kind, index, sample, double, 0.7, following)
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
            Scheduler(), velocity, timesteps(index), sample, generator=generator, sde_type=kind
        )  # fmt: skip

    first, again, other = step(5), step(5), step(6)
    assert len(first) == 4 and first[0].dtype == torch.float32
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    expected = expected_step(kind, index, sample, velocity, 0.7, first[0])
    for row, (mean, _, scale, log_prob) in enumerate(expected):
        noise = (first[0][row].double() - mean) / scale
        assert abs(noise.mean()) < 0.04 and abs(noise.std() - 1) < 0.03
        torch.testing.assert_close(first[1][row].double(), log_prob, rtol=1e-5, atol=1e-5)
    assert not torch.equal(first[0][0] - first[2][0], first[0][1] - first[2][1])


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_flow_grpo_step_that_draws_is_differentiable(kind):
    """As if the drawn sample had been given: log_prob and mean reach the velocity, and have the same values."""
    sample, velocity = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    times, leaves = timesteps([2, 5]), [velocity.clone().requires_grad_() for _ in range(2)]
    drawn = sde_step_with_logprob(Scheduler(), leaves[0], times, sample, sde_type=kind)
    assert not drawn[0].requires_grad
    given = sde_step_with_logprob(Scheduler(), leaves[1], times, sample, 0.7, drawn[0], sde_type=kind)
    for found, expected in zip(drawn[:3], given[:3], strict=True):
        torch.testing.assert_close(found, expected)
    for result in (drawn, given):
        (result[1].sum() + result[2].square().sum()).backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)
    log_prob = sde_step_with_logprob(Scheduler(), velocity, times, sample, sde_type=kind)[1]
    assert log_prob.shape == (2,) and not log_prob.requires_grad


def test_flow_grpo_deterministic_steps_have_a_finite_log_prob():
    sample, velocity = torch.randn(1, 4, 4), torch.randn(1, 4, 4)
    for kind, index, level in (("cps", 9, 0.7), ("cps", 3, 0.0), ("sde", 3, 0.0)):
        found = sde_step_with_logprob(Scheduler(), velocity, timesteps([index]), sample, level, sde_type=kind)
        torch.testing.assert_close(found[0], found[2])
        assert float(found[1]) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("kind", ["sde", "cps"])
@pytest.mark.parametrize("given", [True, False])
def test_flow_grpo_one_timestep_for_a_batch(kind, given):
    """As its pipelines call it (`t.unsqueeze(0)`): std and sqrt_dt stay at (1, 1, 1, 1)."""
    sample, velocity, following = (torch.randn(4, 3, 8, 8) for _ in range(3))
    options = {"prev_sample": following} if given else {"generator": torch.Generator().manual_seed(3)}
    found, log_prob, mean, std, sqrt_dt = sde_step_with_logprob(
        Scheduler(), velocity, timesteps([4]), sample, 0.7, **options, sde_type=kind, return_sqrt_dt=True
    )
    assert std.shape == sqrt_dt.shape == (1, 1, 1, 1) and log_prob.shape == (4,) and found.shape == sample.shape
    expected = expected_step(kind, [4] * 4, sample, velocity, 0.7, found)
    for row, (row_mean, row_std, _, row_log_prob) in enumerate(expected):
        torch.testing.assert_close(mean[row].double(), row_mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(log_prob[row].double(), row_log_prob, rtol=1e-5, atol=1e-5)
        assert float(std) == pytest.approx(row_std, rel=1e-6)
    assert float(sqrt_dt) == pytest.approx(math.sqrt(float(SIGMAS[4] - SIGMAS[5])), rel=1e-5)
    if not given:
        assert not torch.equal(found[0] - mean[0], found[1] - mean[1])


@pytest.mark.parametrize("level", [1.0, 1.2, 1.8])
@pytest.mark.parametrize("step", [flow_cps.sde_step_with_logprob, sde_step_with_logprob], ids=["flow_cps", "flow_grpo"])
def test_cps_levels_above_1(step, level):
    sample, velocity, following = (torch.randn(2, 4, 6) for _ in range(3))
    options = {} if step is flow_cps.sde_step_with_logprob else {"sde_type": "cps"}
    found = step(Scheduler(), velocity, timesteps([2, 5]), sample, level, following, **options)
    for row, (mean, std, _, log_prob) in enumerate(expected_step("cps", [2, 5], sample, velocity, level, following)):
        torch.testing.assert_close(found[2][row].double(), mean, rtol=1e-5, atol=1e-5)
        assert float(found[1][row]) == pytest.approx(float(log_prob), rel=1e-5)
        assert float(found[3][row]) == pytest.approx(std, rel=1e-6)


def test_flow_cps_is_cps_without_being_asked():
    """Its calls give no kind: the drop-in of Flow-GRPO would take the SDE."""
    sample, velocity = torch.randn(2, 4, 32, 32), torch.randn(2, 4, 32, 32)
    leaf = velocity.clone().requires_grad_()
    found = flow_cps.sde_step_with_logprob(Scheduler(), leaf, timesteps([3]), sample)
    assert len(found) == 4 and found[3].shape == (1, 1, 1, 1)
    double = velocity.double().requires_grad_()
    expected = expected_step("cps", [3, 3], sample, double, 0.7, found[0])
    for row, (mean, _, scale, log_prob) in enumerate(expected):
        noise = (found[0][row].double() - mean.detach()) / scale
        assert abs(noise.mean()) < 0.08 and abs(noise.std() - 1) < 0.06
        torch.testing.assert_close(found[1][row].double(), log_prob, rtol=1e-5, atol=1e-6)
    found[1].sum().backward()
    sum(row[3] for row in expected).backward()
    torch.testing.assert_close(leaf.grad.double(), double.grad, rtol=1e-4, atol=1e-7)


FLOW_GRPO = "self model_output timestep sample noise_level prev_sample generator sde_type return_sqrt_dt"
FLOW_CPS = "self model_output timestep sample noise_level prev_sample generator"
DANCE_GRPO = "model_output latents eta sigmas index prev_sample grpo sde_solver"


@pytest.mark.parametrize(
    ("function", "names", "defaults"),
    [
        (sde_step_with_logprob, FLOW_GRPO, [0.7, None, None, "sde", False]),
        (flow_cps.sde_step_with_logprob, FLOW_CPS, [0.7, None, None]),
        (flux_step, DANCE_GRPO, []),
        (flux_step_without_constants, DANCE_GRPO, []),
    ],
)
def test_signatures_are_those_of_the_originals(function, names, defaults):
    parameters = inspect.signature(function).parameters
    assert list(parameters) == names.split()
    assert [p.default for p in parameters.values() if p.default is not p.empty] == defaults


def flow_grpo_call(**changes):
    arguments = {"model_output": torch.zeros(2, 3), "timestep": timesteps([3]), "sample": torch.zeros(2, 3)}
    return sde_step_with_logprob(Scheduler(), **(arguments | changes))


def flow_cps_call(**changes):
    return flow_cps.sde_step_with_logprob(Scheduler(), torch.zeros(2, 3), timesteps([3]), torch.zeros(2, 3), **changes)


def dance_call(**changes):
    return flux_step(torch.zeros(2, 3), torch.zeros(2, 3), 0.3, SIGMAS, 4, None, True, True, **changes)


TWO = [torch.Generator(), torch.Generator()]
WRONG_USE = [
    (flow_grpo_call, {"sde_type": "ode"}, ValueError, "sde_type: found 'ode', expected one of sde, cps"),
    (
        flow_grpo_call,
        {"timestep": timesteps([1, 2, 3])},
        ValueError,
        "timestep: found 3 of them, expected one",
    ),
    (flow_grpo_call, {"noise_level": -0.1}, ValueError, "noise_level: found -0.1, expected a number from 0 to"),
    (
        flow_grpo_call,
        {"noise_level": torch.zeros(2, 3)},
        ValueError,
        "noise_level: found Tensor, expected a Python",
    ),
    (flow_grpo_call, {"prev_sample": 0.7}, ValueError, "prev_sample: found float, expected a tensor of shape (2, 3)"),
    (flow_grpo_call, {"generator": [*TWO, *TWO]}, ValueError, "generator: found a list of 4, expected a torch.Generat"),
    (
        flow_grpo_call,
        {"generator": 7},
        ValueError,
        "generator: found int, expected a torch.Generator",
    ),
    (flow_grpo_call, {"generator": [7, 8]}, ValueError, "generator: found a list of 2, expected a torch.Generator or"),
    (
        flow_grpo_call,
        {"generator": []},
        ValueError,
        "generator: found a list of 0, expected a torch.Gen",
    ),
    (flow_grpo_call, {"determistic": True}, TypeError, "tempflow_grpo in this folder has it"),
    (
        flow_grpo_call,
        {"return_dt_and_std_dev_t": True},
        TypeError,
        "return_dt_and_std_dev_t: found a keyword",
    ),
    (
        flow_cps_call,
        {"sde_type": "sde"},
        TypeError,
        "sde_type: found a keyword that flow_cps.sde_step_with_logprob",
    ),
    (flow_cps_call, {"noise_level": 2.5}, ValueError, "noise_level: found 2.5, expected a number from 0 to 2"),
    (dance_call, {"determistic": True}, TypeError, "determistic: found a keyword that dance_grpo.flux_step does not"),
]


@pytest.mark.parametrize(("call", "changes", "error", "message"), WRONG_USE, ids=[row[3][:40] for row in WRONG_USE])
def test_wrong_use_is_one_line(call, changes, error, message):
    with pytest.raises(error) as caught:
        call(**changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_list_of_generators_gives_each_row_its_own():
    """As Flow-GRPO's `create_generator` makes it: the noise of a row depends on its generator alone."""
    sample, velocity = torch.randn(3, 4, 5), torch.randn(3, 4, 5)

    def step(rows, generator):
        return sde_step_with_logprob(Scheduler(), velocity[rows], timesteps([2]), sample[rows], generator=generator)[0]

    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    whole = step(slice(0, 3), generators(5, 6, 5))
    assert torch.equal(whole[1:2], step(slice(1, 2), generators(6))) and torch.equal(
        whole[2:], step(slice(2, 3), generators(5)[0])
    )
    assert torch.equal(step(slice(0, 3), generators(5)), step(slice(0, 3), generators(5)[0]))


@pytest.mark.parametrize("many", [False, True])
def test_a_cpu_generator_serves_latents_of_another_device(many):
    """`meta` stands for a GPU: keys are drawn where the generator lives, then moved."""
    from tempflow_kernels.compat.steps import draw_keys

    generators = [torch.Generator().manual_seed(9) for _ in range(3)]
    before = generators[0].get_state()
    keys = draw_keys(3, torch.device("meta"), generators if many else generators[0])
    assert keys.device.type == "meta" and keys.shape == (3, 2) and keys.dtype == torch.int64
    assert not torch.equal(generators[0].get_state(), before)


@pytest.mark.parametrize("sde_solver", [True, False])
def test_dance_grpo_step(sde_solver):
    x, v, following, eta, index = torch.randn(2, 6, 4), torch.randn(2, 6, 4), torch.randn(2, 6, 4), 0.3, 4
    leaf, double = v.clone().requires_grad_(), v.double().requires_grad_()
    mean, data, std, expected = dance_step(x, double, following, eta, index, sde_solver)
    found, original, log_prob = flux_step(leaf, x, eta, SIGMAS, index, following, True, sde_solver)
    assert torch.equal(found, following)
    torch.testing.assert_close(original.double(), data, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_prob.double(), expected, rtol=1e-5, atol=1e-5)
    log_prob.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(leaf.grad.double(), double.grad, rtol=1e-4, atol=1e-5)
    before = flux_step_without_constants(v, x, eta, SIGMAS, index, following, True, sde_solver)[2]
    square = -(following.double() - mean).square() / (2 * std**2)
    torch.testing.assert_close(before.double(), square.mean((1, 2)).detach(), rtol=1e-5, atol=1e-5)
    for step in (flux_step, flux_step_without_constants):
        deterministic, again = step(v, x, eta, SIGMAS, index, None, False, sde_solver)
        torch.testing.assert_close(deterministic.double(), mean.detach(), rtol=1e-5, atol=1e-5)
        assert torch.equal(again, original)


def test_dance_grpo_step_that_draws():
    x, v = torch.randn(2, 64, 64), torch.randn(2, 64, 64)
    drawn, _, log_prob = flux_step(v, x, 0.3, SIGMAS, 4, None, True, True)
    mean, _, std, expected = dance_step(x, v.double(), drawn, 0.3, 4, True)
    noise = (drawn.double() - mean) / std
    assert abs(noise.mean()) < 0.06 and abs(noise.std() - 1) < 0.04
    torch.testing.assert_close(log_prob.double(), expected, rtol=1e-4, atol=1e-4)
    for step in (flux_step, flux_step_without_constants):
        still, _, nothing = step(v, x, 0.0, SIGMAS, 4, None, True, True)
        assert not nothing.any()
        torch.testing.assert_close(still, step(v, x, 0.0, SIGMAS, 4, None, False, True)[0], rtol=0, atol=1e-6)
