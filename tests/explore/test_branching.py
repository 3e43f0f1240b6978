"""Chunks of branches against the straightforward nested loops, and what forks and siblings share."""

import pytest
import torch
from tempflow_kernels import normal_like

from tempflow.common.draws import Draw
from tempflow.common.errors import BadInput
from tempflow.credit.scoring import decode_branches
from tempflow.explore.plan import BranchPlan
from tempflow.explore.rollout import sample_branches, sample_trunk
from tempflow.explore.tails.engine import EagerEngine
from tempflow.forecast.cost import BranchCost
from tempflow.learn.batches import updates
from tempflow.settings.fields import LearnConfig

TEXTS = ("one", "three", "eleven")


def explore(policy, schedule, plan, trunk_rows=4, tail_rows=5, seeds=2, texts=TEXTS):
    draw = Draw.grid(7, 3, range(len(texts)), seeds)
    conditioning = policy.encode(texts).repeat(seeds)
    trunk = sample_trunk(policy, conditioning, schedule, plan, draw, trunk_rows)
    chunks = list(sample_branches(EagerEngine(policy, tail_rows), trunk, schedule))
    assert [row for chunk in chunks for row in chunk.trunks] == trunks_in_order(plan, len(texts) * seeds)
    finished = torch.cat([chunk.latents for chunk in chunks])
    return trunk, finished.view(len(plan.steps), len(texts) * seeds, plan.siblings, *policy.latent_shape)


def trunks_in_order(plan, rows):
    return [row for _ in plan.steps for row in range(rows) for _ in range(plan.siblings)]


@torch.no_grad()
def nested_loops(policy, schedule, plan, seeds=2, texts=TEXTS):
    """Trunk by trunk, fork by fork, sibling by sibling, at batch size 1, with the coefficients written out."""
    sigmas, results = schedule.sigmas, []
    draw = Draw.grid(7, 3, range(len(texts)), seeds)
    noises = draw.initial_noise(policy.latent_shape)
    for fork in plan.steps:
        for row in range(len(noises)):
            conditioning = policy.encode([texts[row // seeds]])
            for sibling in range(plan.siblings):
                x = noises[row : row + 1]
                for step in range(schedule.num_steps):
                    velocity = policy.velocity(x, sigmas[step].float().view(1), conditioning)
                    if step == fork:
                        noise = normal_like(noises, draw.step_keys(step), plan.siblings)[row, sibling]
                        sde = schedule.sde
                        x = sde.x_coef[step].float() * x + sde.v_coef[step].float() * velocity
                        x = x + sde.std[step].float() * noise
                    else:
                        x = x - (sigmas[step] - sigmas[step + 1]).float() * velocity
                results.append(x[0])
    return torch.stack(results).view(len(plan.steps), len(noises), plan.siblings, *policy.latent_shape)


@pytest.mark.parametrize("steps", ["all", [0, 3, 8], "first:2", [8]])
def test_chunks_equal_nested_loops(toy, schedule, steps):
    plan = BranchPlan.parse(steps, 10, 3)
    _, branches = explore(toy, schedule, plan)
    assert torch.equal(branches, nested_loops(toy, schedule, plan))


def test_chunks_equal_nested_loops_on_the_sd3_pipeline(digits_policy, schedule):
    plan = BranchPlan.parse([1, 6], 10, 2)
    texts = ("a two at the top left", "three fours")
    _, branches = explore(digits_policy, schedule, plan, texts=texts)
    expected = nested_loops(digits_policy, schedule, plan, texts=texts)
    assert (branches - expected).abs().max() < 1e-4  # rounding of other batch shapes, carried through ten steps
    assert branches.std() > 0.3


def test_chunk_sizes_do_not_matter(toy, schedule):
    plan = BranchPlan.parse("all", 10, 4)
    reference = explore(toy, schedule, plan, 6, 1000)[1]
    for trunk_rows, tail_rows in ((1, 1), (2, 7), (4, 24)):
        assert torch.equal(explore(toy, schedule, plan, trunk_rows, tail_rows)[1], reference)


def test_network_calls_are_those_of_the_plan(toy, schedule):
    """Tails advance in chunks of one size; the printed cost is what is spent."""
    plan = BranchPlan.parse("all", 10, 4)
    explore(toy, schedule, plan, trunk_rows=2, tail_rows=24)
    cost = BranchCost.of(plan, 6, 6, 18)
    assert sum(toy.calls) == cost.trunk_rows + cost.tail_rows == 6 * 9 + 6 * 4 * 45
    assert set(toy.calls) == {2, 24}
    assert cost.images == 6 * 9 * 4 and cost.learn_rows == 6 * 9


def test_siblings_share_the_trunk_state_and_differ_by_one_step(toy, schedule):
    plan = BranchPlan.parse([4], 10, 5)
    trunk, branches = explore(toy, schedule, plan)
    assert len(branches[0, 0].flatten(1).unique(dim=0)) == 5
    assert trunk.latents.shape == trunk.velocity.shape == (1, 6, 2, 3)
    conditioning = toy.encode(TEXTS).repeat(2)
    velocity = toy.velocity(trunk.latents[0], schedule.sigma_rows(4, 6), conditioning)
    assert torch.equal(velocity, trunk.velocity[0])


def test_draw_of_a_prompt_does_not_depend_on_its_rank(toy):
    everyone = Draw.grid(1, 5, range(4), 3)
    second = Draw.grid(1, 5, range(2, 4), 3)
    assert torch.equal(everyone.initial_noise((2, 3))[6:], second.initial_noise((2, 3)))
    assert torch.equal(everyone.step_keys(2)[6:], second.step_keys(2))
    for other in (Draw.grid(2, 5, range(4), 3), Draw.grid(1, 6, range(4), 3)):
        assert not torch.equal(everyone.step_keys(2), other.step_keys(2))
    assert not torch.equal(everyone.step_keys(2), everyone.step_keys(3))


def test_updates_hold_every_fork_once_with_all_siblings(toy, schedule):
    plan = BranchPlan.parse([0, 2, 5], 10, 4)
    trunk, _ = explore(toy, schedule, plan)
    advantages, weights = torch.randn(3, 6, 4), torch.rand(3, 6)
    batches = list(updates(trunk, advantages, weights, LearnConfig(rows=2, updates=3)))
    assert [len(update) for update in batches] == [3, 3, 3]
    assert all(sum(batch.share for batch in update) == pytest.approx(1) for update in batches)
    seen = torch.cat([batch.advantages for update in batches for batch in update])
    assert seen.shape == (18, 4)
    assert torch.equal(seen.sort(0).values, advantages.view(18, 4).sort(0).values)
    batch = batches[1][2]
    assert batch.step == 5 and torch.equal(batch.latents, trunk.latents[2, 2:4])
    assert torch.equal(batch.keys, trunk.keys[2, 2:4]) and torch.equal(batch.weights, weights[2, 2:4])


def test_masked_batches_are_left_out_unless_kl_needs_them(toy, schedule):
    trunk, _ = explore(toy, schedule, BranchPlan.parse([0, 2, 5], 10, 4))
    advantages, weights = torch.randn(3, 6, 4), torch.ones(3, 6)
    weights[1, 2:4] = 0
    (batches,) = updates(trunk, advantages, weights, LearnConfig(rows=2))
    assert len(batches) == 8 and batches[0].share == 1 / 9
    assert len(next(updates(trunk, advantages, weights, LearnConfig(rows=2, kl=0.1)))) == 9


def test_inner_epochs_repeat_the_updates(toy, schedule):
    trunk, _ = explore(toy, schedule, BranchPlan.parse([0, 2, 5], 10, 4))
    learn = LearnConfig(rows=3, updates=2, inner_epochs=3)
    assert len(list(updates(trunk, torch.randn(3, 6, 4), torch.ones(3, 6), learn))) == 6


def test_decode_keeps_the_layout(toy):
    latents = torch.randn(2, 3, 4, 2, 3)
    images = decode_branches(toy, latents, 5)
    assert images.shape == (2, 3, 4, 3, 2, 3) and images.dtype == torch.uint8
    assert torch.equal(images[1, 2, 3], toy.decode(latents[1, 2, 3:])[0])


def test_random_plans_draw_a_fresh_subset_each_iteration():
    plan = BranchPlan.parse("random:3", 10, 6)
    drawn = [plan.drawn(42, iteration).steps for iteration in range(300)]
    assert all(len(steps) == 3 and list(steps) == sorted(set(steps)) for steps in drawn)
    counts = [sum(step in steps for steps in drawn) for step in range(9)]
    assert min(counts) > 60 and max(counts) < 140
    assert drawn == [plan.drawn(42, iteration).steps for iteration in range(300)]
    assert drawn != [plan.drawn(43, iteration).steps for iteration in range(300)]
    assert plan.drawn(42, 0).pool == tuple(range(9))


@pytest.mark.parametrize("steps", [[9], [-1], [0, 12], [], "first:0", "random:10", "last:2", "0,1"])
def test_forks_outside_the_schedule_are_refused(steps):
    with pytest.raises(BadInput) as caught:
        BranchPlan.parse(steps, 10, 6)
    assert caught.value.field == "explore.forks"


def test_cost_of_the_paper_setting():
    """T = 10, K = 6, every step: 9 trunk and 270 tail evaluations and 54 images per initial noise."""
    plan = BranchPlan.parse("all", 10, 6)
    cost = BranchCost.of(plan, 1, 16 * 64 * 64, 3 * 512 * 512)
    assert (cost.trunk_rows, cost.tail_rows, cost.learn_rows, cost.images) == (9, 270, 9, 54)
    assert "54 images" in cost.describe(plan, 2) and "576 in all" in cost.describe(plan, 2)
