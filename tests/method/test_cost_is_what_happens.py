"""The forecast of an iteration against the network rows, images and bytes of a training step that is watched."""

from collections import Counter

import pytest
import torch
from toy_trainer import FIRST, SHAPE, make_trainer, panel_of, parameters_of, small, tilt

import tempflow.train
from tempflow.explore.tails.solver import tail_solvers
from tempflow.forecast.cost import Shape, iteration_cost, learning_passes, network_rows

CASES = {
    "tempflow, KL, two passes": ["tempflow", "explore.siblings=3", "objective.kl=0.1", "learn.inner_epochs=2"],
    "chains": ["flow_grpo", "explore.noises=4"],
    "two tails": ["g2rpo", "explore.siblings=3", "sample.steps=6"],
    "jumps": ["egrpo", "explore.siblings=3", "sample.steps=7"],
    "windows of siblings, last step dropped": [
        "explore.noises=2", "explore.siblings=2", "explore.forks=[0,1]", "explore.window=2", "tails.drop_below=0.5"],
}  # fmt: skip


def watched_step(config):
    """Network rows by purpose, images, and the rollout of one training step."""
    trainer, record = make_trainer(config, panel_of((tilt,), (1.0,)))
    policy, rows, seen = trainer.policy, Counter(), []
    velocity, explore = policy.velocity, tempflow.train.explore

    def count(latents, *arguments):
        purpose = "tails" if policy.own is policy.copies else "explore" if not seen else "learn"
        rows[purpose] += len(latents)
        return velocity(latents, *arguments)

    def watch(*arguments):
        seen.append(explore(*arguments))
        return seen[0]

    policy.velocity, tempflow.train.explore = count, watch
    try:
        tempflow.train.train_step(trainer, 0)
    finally:
        tempflow.train.explore = explore
    return trainer, rows, sum(len(latents) for _, latents in record.images), seen[0]


@pytest.mark.parametrize("name", CASES)
def test_an_iteration_costs_what_was_forecast(name):
    config = small(*CASES[name])
    trainer, rows, images, rollout = watched_step(config)
    explore, passes = config.explore, learning_passes(config)
    shape = Shape(explore.prompts * explore.noises, explore.siblings, 6, 24, passes)
    cost = iteration_cost(trainer.method.rule, trainer.schedule, tail_solvers(config.tails), shape)
    assert cost.trunk_rows + cost.window_rows == rows["explore"]
    assert (cost.tail_rows, cost.learn_rows, cost.images) == (rows["tails"], rows["learn"], images)
    held = [tensor for d in rollout.decisions for tensor in (d.latents, d.velocity)]
    assert cost.state_bytes == sum(tensor.nbytes for tensor in held)
    assert cost.branch_bytes == rollout.branches.nbytes * (1 + len(trainer.tails))
    assert cost.image_bytes == 24 * images
    later = rollout.branches[..., 0, 0].numel() * (trainer.method.rule.window - 1)
    assert (cost.forks, cost.window_rows) == (len(rollout.branches), later)
    assert trainer.method.branches(explore.prompts) == rollout.branches[..., 0, 0].numel()
    assert network_rows(config, trainer.method, trainer.schedule, 0, 2) == 2 * sum(rows.values())


@pytest.mark.parametrize("draw", ["iteration", "prompt"])
def test_forks_that_are_drawn_cost_what_was_drawn(draw):
    """Not what the forecast fears: as if all forks lay early, and a trunk went on to the last."""
    settings = ["explore.siblings=3", "explore.noises=2", "explore.prompts=4", f"explore.draw={draw}", "run.seed=8"]
    config = small("tempflow", "explore.forks=random:2", "sample.steps=7", *settings)
    trainer, rows, _, _ = watched_step(config)
    assert network_rows(config, trainer.method, trainer.schedule, 0, 1) == sum(rows.values())
    cost = iteration_cost(trainer.method.rule, trainer.schedule, tail_solvers(config.tails), Shape(8, 3, 6, 24))
    assert sum(rows.values()) < cost.trunk_rows + cost.tail_rows + cost.learn_rows


def test_steps_without_guidance_cost_one_row():
    """In the figures of an iteration as in the forecast of it."""
    config = small("tempflow", "explore.siblings=3", "sample.steps=6", "tails.guidance_above=0.5")
    trainer, _ = make_trainer(small("tempflow", "explore.siblings=3", "sample.steps=6"), panel_of((tilt,), (1.0,)))
    rule, schedule, explore = trainer.method.rule, trainer.schedule, config.explore
    cost = iteration_cost(rule, schedule, tail_solvers(config.tails), Shape(explore.prompts * explore.noises, 3, 6, 24))
    found = network_rows(config, trainer.method, schedule, 0, 2)
    everything = cost.trunk_rows + cost.window_rows + cost.tail_rows + cost.learn_rows
    assert cost.unguided_rows > 0 and found == 2 * everything - cost.unguided_rows


def test_the_paper_setting():
    """T = 10, K = 6, every step: 9 trunk and 270 tail evaluations and 54 images per initial noise."""
    trainer, _ = make_trainer(small("tempflow", "sample.steps=10"), panel_of((tilt,), (1.0,)))
    cost = iteration_cost(trainer.method.rule, trainer.schedule, tail_solvers(trainer.config.tails), Shape(1, 6, 6, 24))
    assert (cost.trunk_rows, cost.tail_rows, cost.learn_rows, cost.images) == (9, 270, 9, 54)


def test_tails_follow_the_weights_of_their_iteration():
    """The copy of the weights that tails use is brought up to date before, not after them."""
    trainer, record = make_trainer(small("tempflow", "explore.siblings=3"), panel_of((tilt,), (1.0,)))
    with torch.no_grad():
        for name, value in parameters_of(FIRST).items():
            getattr(trainer.policy, name).copy_(value + 0.3)
    tempflow.train.train_step(trainer, 0)
    fresh, other = make_trainer(small("tempflow", "explore.siblings=3", "tails.merged=false"),
                                panel_of((tilt,), (1.0,)))  # fmt: skip
    with torch.no_grad():
        for name, value in parameters_of(FIRST).items():
            getattr(fresh.policy, name).copy_(value + 0.3)
    tempflow.train.train_step(fresh, 0)
    assert torch.equal(record.finished(), other.finished()) and record.finished().shape[1:] == SHAPE
