"""The training step: first ratio exactly 1, weights, masks, inner epochs, KL, moving average."""

import pytest
import torch
from tempflow_kernels import BranchLossStats, branch_loss, gaussian_terms

from tempflow.common.draws import Draw
from tempflow.explore.plan import BranchPlan
from tempflow.explore.rollout import sample_trunk
from tempflow.learn.average import MovingAverage
from tempflow.learn.batches import updates
from tempflow.learn.optimizers import make_optimizer, set_learning_rate
from tempflow.learn.statistics import LossRecord, loss_figures
from tempflow.settings.fields import LearnConfig

TEXTS = ("a two at the top left", "three fours", "a one above a nine")


def first_update(policy, schedule, rows=3, seeds=2, siblings=4, move=None):
    """Stats of the first optimizer step's batches, after `move` has changed the parameters."""
    plan = BranchPlan.parse([0, 4, 8], 10, siblings)
    draw = Draw.grid(0, 0, range(len(TEXTS)), seeds)
    conditioning = policy.encode(TEXTS).repeat(seeds)
    trunk = sample_trunk(policy, conditioning, schedule, plan, draw, rows)
    if move:
        move(policy.trainable())
    count = len(TEXTS) * seeds
    weights = schedule.noise_weights(plan.steps).float()[:, None].expand(3, count)
    (batches,) = updates(trunk, torch.randn(3, count, siblings), weights, LearnConfig(rows=rows))
    record = LossRecord()
    for batch in batches:
        size = len(batch.latents)
        velocity = policy.velocity(batch.latents, schedule.sigma_rows(batch.step, size), batch.conditioning)
        terms = gaussian_terms(schedule.sde.coef(batch.step, size), batch.weights)
        loss, stats = branch_loss(
            velocity, batch.velocity_old, batch.advantages, terms, key=batch.keys, clip_range=(1e-4, 1e-4)
        )
        (loss * batch.share).backward()
        record.add(stats, 0)
    return loss_figures(record.totals())


def test_first_ratio_is_exactly_one_on_the_sd3_pipeline(digits_policy, schedule):
    """Learning repeats the trunk's own network call, so nothing has drifted: not 1e-7, 0."""
    summary = first_update(digits_policy, schedule)
    assert summary["first_log_ratio_max"] == 0.0 and summary["log_ratio_max"] == 0.0
    assert summary["ratio_mean"] == 1.0 and summary["clip_fraction"] == 0.0
    assert any(parameter.grad.abs().sum() > 0 for parameter in digits_policy.trainable().values())


def test_a_moved_policy_has_another_ratio(digits_policy, schedule, disturb):
    summary = first_update(digits_policy, schedule, move=lambda parameters: disturb(parameters, 0.01))
    assert summary["log_ratio_max"] > 1e-5 and summary["clip_fraction"] > 0


def test_figures_of_several_ranks_are_those_of_one():
    """Means are weighted by batches, maxima are maxima, and the first update is told from the rest."""

    def stats(value):
        return BranchLossStats(*(torch.tensor(float(value)) for _ in BranchLossStats._fields))

    whole, ranks = LossRecord(), [LossRecord(), LossRecord(), LossRecord()]
    for rank, update, value in ((0, 0, 1.0), (0, 1, 5.0), (1, 0, 0.0), (1, 0, 2.0), (1, 1, 4.0)):
        whole.add(stats(value), update)
        ranks[rank].add(stats(value), update)
    figures = loss_figures(torch.cat([record.totals() for record in ranks]))
    assert figures == pytest.approx(loss_figures(whole.totals()))
    assert (figures["kl"], figures["log_ratio_max"]) == (pytest.approx(2.4), 5.0)
    assert (figures["first_log_ratio_mean"], figures["first_log_ratio_max"]) == (1.0, 2.0)
    assert loss_figures(LossRecord().totals()) == {}


def test_reference_is_the_model_before_training(digits_policy, schedule):
    latents, sigma = torch.randn(2, 4, 8, 8), torch.tensor([0.9, 0.3])
    conditioning = digits_policy.encode(TEXTS[:2])
    with torch.no_grad():
        trained = digits_policy.velocity(latents, sigma, conditioning)
        with digits_policy.reference():
            before = digits_policy.velocity(latents, sigma, conditioning)
        for name, parameter in digits_policy.trainable().items():
            if ".lora_B." in name:
                parameter.zero_()
        assert torch.equal(digits_policy.velocity(latents, sigma, conditioning), before)
    assert (trained - before).abs().max() > 1e-3


def test_gradients_reach_exactly_the_adapters(digits_policy):
    parameters = dict(digits_policy.network.module.named_parameters())
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    assert trained == set(digits_policy.trainable()) and all(".lora_" in name for name in trained)
    velocity = digits_policy.velocity(torch.randn(2, 4, 8, 8), torch.full((2,), 0.5), digits_policy.encode(TEXTS[:2]))
    velocity.square().sum().backward()
    assert {name for name, parameter in parameters.items() if parameter.grad is not None} == trained


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
    optimizer = make_optimizer(LearnConfig(lr=0.1, weight_decay=0.5, betas=(0.8, 0.9)), [parameter])
    parameter.grad = torch.zeros(2)
    optimizer.step()
    assert parameter.data.tolist() == pytest.approx([0.95, 0.95])
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
