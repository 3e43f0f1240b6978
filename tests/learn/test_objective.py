"""What the loss multiplies at each step, against the formulas of the papers, in float64."""

import pytest
import torch

from tempflow.common.errors import BadInput
from tempflow.explore.schedule import build_schedule
from tempflow.learn.objective import KL, PRODUCT, SQUARE, WEIGHT, make_objective
from tempflow.settings.fields import ObjectiveConfig

SIGMAS = (1.0, 0.93, 0.8, 0.55, 0.3, 0.0)
JUMPS = (1, 1, 2, 1, 1)
DEFAULTS = {"weighting": "noise", "ratio": "gaussian", "kl_divisor": "std"}


def tables(trained, transition="flow_sde", jumps=JUMPS, idle="keep", **objective):
    """The terms, and std, |v_coef| and the step size of every step."""
    schedule = build_schedule(SIGMAS, transition, 0.7, jumps)
    terms = make_objective(ObjectiveConfig(**DEFAULTS | objective), schedule, trained, idle).terms
    sizes = torch.tensor([SIGMAS[step] - SIGMAS[step + jump] for step, jump in enumerate(jumps)], dtype=torch.float64)
    return terms, schedule.sde.std, schedule.sde.v_coef.abs(), sizes


def test_only_trained_steps_have_terms():
    terms, *_ = tables([0, 2])
    assert terms.shape == (5, 4) and terms.dtype == torch.float64
    assert terms[[0, 2]].all() and not terms[[1, 3, 4]].any()


@pytest.mark.parametrize("trained", [[0, 1, 2, 3], [1], [0, 2]], ids=str)
@pytest.mark.parametrize("weighting", ["noise", "uniform", "inverse_step", "inverse_sensitivity"])
def test_weights_have_mean_one_over_the_steps_that_are_trained(weighting, trained):
    """Not over those drawn in one iteration, nor over the whole schedule."""
    terms, std, v_coef, sizes = tables(trained, weighting=weighting)
    raw = {"noise": std, "uniform": torch.ones(5).double(), "inverse_step": 1 / sizes,
           "inverse_sensitivity": std / v_coef}[weighting][trained]  # fmt: skip
    assert torch.allclose(terms[trained, WEIGHT], len(trained) * raw / raw.sum(), rtol=1e-13)
    assert terms[trained, WEIGHT].mean().item() == pytest.approx(1, rel=1e-13)


def test_listed_weights_stand_as_they_are_given():
    terms, *_ = tables([0, 2], weighting=[4.0, 9.0, 0.5, 0.0])
    assert terms[:, WEIGHT].tolist() == [4.0, 0.0, 0.5, 0.0, 0.0]


def test_a_step_that_is_trained_has_a_weight():
    with pytest.raises(BadInput) as caught:
        tables([0, 2, 3], weighting=[4.0, 9.0, 0.5, 0.0])
    assert caught.value.field == "objective.weighting" and "step 3" in caught.value.hint


@pytest.mark.parametrize("count", [3, 5])
def test_a_list_has_a_weight_for_each_step_but_the_last(count):
    with pytest.raises(BadInput) as caught:
        tables([0, 2], weighting=[1.0] * count)
    assert caught.value.field == "objective.weighting"


@pytest.mark.parametrize("transition", ["flow_sde", "dance_sde", "flash_sde", "cps"])
@pytest.mark.parametrize("ratio", ["gaussian", "guard", "undivided"])
def test_log_ratios_are_those_of_the_papers(ratio, transition):
    """Of one element: the state reached by the old velocity and noise, seen from both means."""
    trained, old, new, noise = [0, 1, 2], 0.7, 0.45, -1.3
    terms, std, *_ = tables(trained, transition, ratio=ratio)
    schedule = build_schedule(SIGMAS, transition, 0.7, JUMPS)
    for step in trained:
        mean_old, mean_new, s = schedule.sde.v_coef[step] * old, schedule.sde.v_coef[step] * new, std[step]
        reached = mean_old + s * noise
        squares = (reached - mean_old) ** 2 - (reached - mean_new) ** 2
        expected = {
            "gaussian": squares / (2 * s**2),
            "undivided": squares,
            # std * (log_ratio + (mean_new - mean_old)^2 / (2 std^2)), the quadratic term of its mean taken out
            "guard": s * (squares / (2 * s**2) + (mean_new - mean_old) ** 2 / (2 * s**2)),
        }[ratio]
        change = old - new
        found = -(terms[step, SQUARE] * change**2 + terms[step, PRODUCT] * change * noise)
        assert found.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("ratio", ["gaussian", "guard", "undivided"])
@pytest.mark.parametrize("divisor", ["std", "diffusion"])
def test_kl_is_the_gaussians_whatever_the_ratio(divisor, ratio):
    """v_coef^2 over 2 std^2, or over 2 g^2 where std^2 = g^2 dt: smaller by the size of the step, a merged one too."""
    trained = [0, 1, 2, 3]
    terms, std, v_coef, sizes = tables(trained, ratio=ratio, kl_divisor=divisor)
    expected = v_coef**2 / (2 * std**2)
    if divisor == "diffusion":
        expected = v_coef**2 / (2 * (std**2 / sizes))
    assert torch.allclose(terms[trained, KL], expected[trained], rtol=1e-12)


def test_a_step_without_noise_is_refused():
    """The last step of coefficients-preserving sampling goes to 0, and has none."""
    schedule = build_schedule(SIGMAS, "cps", 0.8)
    for ratio in ("gaussian", "guard", "undivided"):
        with pytest.raises(BadInput) as caught:
            make_objective(ObjectiveConfig(ratio=ratio), schedule, [0, 4])
        assert caught.value.field == "sample.noise_level"
    assert make_objective(ObjectiveConfig(), schedule, [0, 3]).terms[3].all()


@pytest.mark.parametrize(("idle", "silent"), [("keep", (WEIGHT,)), ("drop", (WEIGHT, KL))])
def test_groups_that_tell_nothing_are_silent(idle, silent):
    schedule = build_schedule(SIGMAS, "flow_sde", 0.7)
    objective = make_objective(ObjectiveConfig(kl=0.5), schedule, [0, 1, 2, 3], idle)
    rows = objective.rows(torch.tensor([0, 2, 2]), torch.tensor([True, False, True]))
    assert rows.dtype == torch.float32 and torch.equal(rows[[0, 2]], objective.terms[[0, 2]].float())
    for column in range(4):
        assert rows[1, column] == (0 if column in silent else objective.terms[2, column].float())
    assert (objective.clip, objective.kl) == (1e-4, 0.5)
    assert objective.learns_from_idle() == (idle == "keep") == objective.learns(rows[1:2])


def test_without_kl_idle_groups_teach_nothing():
    objective = make_objective(ObjectiveConfig(kl=0.0), build_schedule(SIGMAS, "flow_sde", 0.7), [0, 1])
    nothing = objective.rows(torch.tensor([0, 1]), torch.tensor([False, False]))
    assert not objective.learns(nothing) and not objective.learns_from_idle()
    assert objective.learns(objective.rows(torch.tensor([0, 1]), torch.tensor([False, True])))


def test_dropped_groups_leave_the_mean_to_the_others():
    schedule, informative = build_schedule(SIGMAS, "flow_sde", 0.7), torch.tensor([[True, False, False], [True] * 3])
    keep, drop = (make_objective(ObjectiveConfig(), schedule, [0], idle) for idle in ("keep", "drop"))
    assert keep.share(informative) == 1.0 and drop.share(informative) == 6 / 4
    assert drop.share(torch.zeros(2, 3, dtype=torch.bool)) > 0  # finite where no group counts
