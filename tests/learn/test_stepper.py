"""One optimizer step: what moves, by how much, what the average follows, and steps that move nothing."""

import pytest
import torch
from torch.nn import Parameter

from tempflow.common.errors import Halted
from tempflow.learn.average import MovingAverage
from tempflow.learn.optimizers import make_optimizer, set_learning_rate
from tempflow.learn.stepper import PATIENCE, LossScale, Stepper
from tempflow.parallel.ranks import Ranks
from tempflow.run import checkpoint
from tempflow.run.snapshot import Progress, take
from tempflow.settings.fields import LearnConfig

ALONE = Ranks(0, 1, torch.device("cpu"))


def plain(max_norm=1.0, scale=False, limit=0.9) -> Stepper:
    """One parameter at 0, whose every step is the gradient itself."""
    parameters = {"w": Parameter(torch.zeros(4))}
    optimizer, average = torch.optim.SGD(parameters.values(), lr=1.0), MovingAverage(parameters, limit, 1)
    return Stepper(parameters, optimizer, average, max_norm, LossScale(torch.device("cpu")) if scale else None)


def step(stepper, gradient, idle=False):
    stepper.parameters["w"].grad = None if gradient is None else torch.tensor(gradient)
    stepper.update(ALONE, idle)
    return stepper.parameters["w"].tolist()


@pytest.mark.parametrize(("max_norm", "size"), [(10.0, 5.0), (1.0, 1.0), (0.05, 0.05)])
def test_steps_are_limited_and_the_norm_is_told_as_it_was(max_norm, size):
    stepper = plain(max_norm)
    moved = torch.tensor(step(stepper, [3.0, 0.0, -4.0, 0.0]))
    assert torch.allclose(moved, -size / 5 * torch.tensor([3.0, 0.0, -4.0, 0.0]), rtol=1e-5)
    assert stepper.read()["grad_norm"] == pytest.approx(5.0) and stepper.parameters["w"].grad is None


def test_the_loss_scale_is_gone_before_gradients_are_limited():
    stepper = plain(1.0, scale=True)
    stepper.backward((stepper.parameters["w"] * torch.tensor([0.3, 0.0, 0.4, 0.0])).sum())
    stepper.step()
    assert torch.allclose(stepper.parameters["w"], -torch.tensor([0.3, 0.0, 0.4, 0.0]), rtol=1e-6)
    assert stepper.read()["grad_norm"] == pytest.approx(0.5)


def test_the_average_follows_the_step_that_was_just_taken():
    """Its first decay is .1, its second 2/11."""
    stepper = plain(10.0)
    step(stepper, [-1.0] * 4)
    assert stepper.average.average["w"].tolist() == pytest.approx([0.9] * 4)
    step(stepper, [-1.0] * 4)
    assert stepper.average.average["w"].tolist() == pytest.approx([2 - 1.1 * 2 / 11] * 4)


def test_an_idle_step_moves_nothing_and_counts_as_norm_zero():
    stepper = plain()
    step(stepper, [2.0, 0.0, 0.0, 0.0])
    moved, averaged = stepper.parameters["w"].tolist(), stepper.average.average["w"].tolist()
    assert step(stepper, None, idle=True) == moved and stepper.average.average["w"].tolist() == averaged
    assert stepper.read()["grad_norm"] == pytest.approx(1.0) and stepper.average.optimizer_steps == 1


def test_momentum_does_not_move_parameters_in_an_idle_step():
    parameters = {"w": Parameter(torch.ones(3))}
    optimizer = make_optimizer(LearnConfig(lr=0.1, weight_decay=0.1), list(parameters.values()))
    stepper = Stepper(parameters, optimizer, MovingAverage(parameters, 0.9, 1), 1.0)
    step(stepper, [1.0, 2.0, 3.0])
    before = parameters["w"].tolist()
    assert step(stepper, [0.0, 0.0, 0.0], idle=True) == before != [1.0] * 3
    assert step(stepper, [0.0, 0.0, 0.0]) != before  # a step of gradient 0 would have


@pytest.mark.parametrize("scale", [False, True])
def test_a_step_without_any_gradient_is_idle_too(scale):
    """Groups tell something, but the weight of their step is 0."""
    stepper = plain(scale=scale)
    assert step(stepper, None) == [0.0] * 4 and stepper.read()["grad_norm"] == 0.0


def scaled(gradient: float, stepper: Stepper, count: int = 1) -> None:
    for _ in range(count):
        stepper.parameters["w"].grad = torch.full((4,), gradient)
        stepper.step()


def test_the_loss_scale_doubles_every_interval_and_not_after():
    stepper, start = plain(scale=True), LossScale.START
    for steps, factor in ((199, 1), (1, 2), (1, 2), (198, 2), (1, 4), (1, 4)):
        scaled(1.0, stepper, steps)
        assert stepper.read()["loss_scale"] == factor * start
    scaled(float("inf"), stepper)
    assert stepper.read()["loss_scale"] == 2 * start
    scaled(1.0, stepper, 199)
    assert stepper.read()["loss_scale"] == 2 * start  # an overflow begins the interval anew
    assert LossScale.INTERVAL == 200


def test_the_loss_scale_has_a_limit():
    stepper = plain(scale=True)
    stepper.scale.scale.fill_(LossScale.LARGEST)
    scaled(1.0, stepper, LossScale.INTERVAL)
    assert stepper.read()["loss_scale"] == LossScale.LARGEST


def test_a_loss_scale_saved_within_an_interval_goes_on_where_it_was(tmp_path):
    whole, resumed = plain(scale=True), plain(scale=True)
    scaled(1.0, whole, 150)
    checkpoint.save(tmp_path, take(Progress(1), whole, {}), keep=1)
    checkpoint.restore(tmp_path, resumed)
    for stepper in (whole, resumed):
        scaled(1.0, stepper, 49)
        assert stepper.read()["loss_scale"] == LossScale.START
        scaled(1.0, stepper)
        assert stepper.read()["loss_scale"] == 2 * LossScale.START


def test_skipped_steps_do_not_count_in_the_mean_norm():
    stepper = plain(scale=True)
    size = LossScale.START  # gradients of 1 and 2 in each of 4 elements: norms 2 and 4
    for gradient in (size, float("nan"), size):
        scaled(gradient, stepper)
    scaled(size, stepper)
    figures = stepper.read()
    assert figures["skipped_steps"] == 1 and figures["grad_norm"] == pytest.approx((2 + 4 + 4) / 3)


def test_moving_average_follows_its_schedule():
    parameters = {"w": torch.nn.Parameter(torch.zeros(3))}
    average = MovingAverage(parameters, limit=0.9, every=2)
    parameters["w"].data.fill_(1.0)
    average.update()
    assert not average.average["w"].any()
    average.update()
    expected = 1 - (1 + 1) / (10 + 1)
    assert torch.allclose(average.average["w"], torch.full((3,), expected))
    with average.applied():
        assert torch.allclose(parameters["w"], torch.full((3,), expected))
    assert torch.equal(parameters["w"].data, torch.ones(3))


def test_moving_average_turned_off_is_the_parameters_themselves():
    parameters = {"w": torch.nn.Parameter(torch.zeros(3))}
    average = MovingAverage(parameters, limit=0.0, every=8)
    parameters["w"].data.fill_(2.0)
    average.update()
    assert torch.equal(average.average["w"], torch.full((3,), 2.0))


def test_learning_rate_is_a_function_of_the_iteration():
    optimizer = make_optimizer(LearnConfig(), [torch.nn.Parameter(torch.ones(1))])
    seen = []
    for schedule in ("constant", "linear"):
        learn = LearnConfig(lr=0.5, lr_schedule=schedule, iterations=4)
        for iteration in range(4):
            set_learning_rate(optimizer, learn, iteration)
            seen.append(optimizer.param_groups[0]["lr"])
    assert seen == [0.5, 0.5, 0.5, 0.5, 0.5, 0.375, 0.25, 0.125]


def test_optimizer_takes_its_settings_from_the_configuration():
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = make_optimizer(LearnConfig(lr=0.1, weight_decay=0.5, betas=(0.8, 0.9), eps=1e-3), [parameter])
    parameter.grad = torch.zeros(2)
    optimizer.step()
    assert parameter.data.tolist() == pytest.approx([0.95, 0.95])
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert optimizer.param_groups[0]["eps"] == 1e-3
    parameter.grad = torch.tensor([1e-3, 0.0])
    optimizer.state.clear()
    optimizer.step()
    assert parameter.data.tolist() == pytest.approx([0.9025 - 0.1 / 2, 0.9025], rel=1e-4)  # eps is as large as the norm


BAD = float("nan")


def two(limit=3, scale=False) -> Stepper:
    """Two parameters whose steps are their gradients."""
    parameters = {name: Parameter(torch.zeros(2)) for name in ("good", "bad")}
    optimizer, average = torch.optim.SGD(parameters.values(), lr=1.0), MovingAverage(parameters, 0.9, 1)
    return Stepper(parameters, optimizer, average, 1.0, LossScale(torch.device("cpu")) if scale else None, limit)


def run(stepper: Stepper, steps: str) -> None:
    """One step each: n with a NaN in one parameter's gradient, g with gradients of 1, i idle."""
    for step in steps:
        for name, parameter in stepper.parameters.items():
            parameter.grad = None if step == "i" else torch.full((2,), BAD if (step, name) == ("n", "bad") else 1.0)
        stepper.update(ALONE, step == "i")


@pytest.mark.parametrize("steps", ["nnn", "gnnn", "nngnnn", "nniin", "inini", "nnng"])
@pytest.mark.parametrize("apart", [False, True])
def test_gradients_that_are_not_finite_end_the_run_in_a_row(steps, apart):
    """Idle steps neither count nor end a row, and a row may span iterations; the tensor is named, and no other."""
    stepper = two(limit=2 if steps == "inini" else 3)
    with pytest.raises(Halted) as caught:
        for part in steps if apart else [steps]:
            run(stepper, part)
            stepper.read()
    assert caught.value.field == "learn.skip_limit" and "(bad)" in caught.value.hint


def test_of_many_tensors_a_few_are_named():
    parameters = {f"w{number}": Parameter(torch.zeros(2)) for number in range(5)}
    average, optimizer = MovingAverage(parameters, 0.9, 1), torch.optim.SGD(parameters.values(), lr=1.0)
    stepper = Stepper(parameters, optimizer, average, 1.0, skip_limit=1)
    for parameter in parameters.values():
        parameter.grad = torch.full((2,), BAD)
    stepper.update(ALONE, False)
    with pytest.raises(Halted, match=r"\(w0, w1, w2 and 2 more\)"):
        stepper.read()


@pytest.mark.parametrize(("steps", "skipped"), [("nngnng", 4), ("g", 0), ("in", 1), ("ii", 0)])
def test_skipped_steps_are_counted_and_move_nothing(steps, skipped):
    stepper = two()
    run(stepper, steps)
    figures = stepper.read()
    assert figures["skipped_steps"] == skipped
    size = -steps.count("g") / 2  # each gradient is limited to the norm 1, of four elements
    for parameter in stepper.parameters.values():
        assert parameter.tolist() == pytest.approx([size, size])


def test_idle_steps_do_not_forgive_fp16():
    """An overflow, an idle step, an overflow: the loss scale does not help however often nothing is to be learnt."""
    stepper = two(scale=True)
    run(stepper, "ni" * (PATIENCE - 1))
    assert stepper.read()["skipped_steps"] == PATIENCE - 1
    run(stepper, "in")
    with pytest.raises(Halted) as caught:
        stepper.read()
    assert caught.value.field == "model.dtype" and "(bad)" in caught.value.hint


class Others(Ranks):
    """This process and one whose own share of another tensor is not finite."""

    def gather(self, values, dim):
        other = torch.zeros_like(values)
        other[0, 0] = 1
        return torch.cat((values, other), dim)

    def average_gradients(self, parameters):
        pass


def test_all_processes_name_the_tensors_of_all():
    stepper = two(limit=1)
    for parameter in stepper.parameters.values():
        parameter.grad = torch.ones(2)
    stepper.parameters["bad"].grad[0] = BAD
    stepper.update(Others(0, 2, torch.device("cpu")), False)
    with pytest.raises(Halted, match=r"\(good, bad\)"):
        stepper.read()
