"""Chunks of branches against straightforward nested loops over single images, bit by bit."""

import itertools

import pytest
import torch
from rollout_cases import TEXTS, explored, finished, forked
from tempflow_kernels import normal_like

from tempflow.common.draws import Draw
from tempflow.credit.decoding import decode_branches
from tempflow.explore.rollout import finish_branches, sibling_keys, stochastic_step
from tempflow.explore.tails.engine import EagerEngine
from tempflow.explore.tails.solver import TailSolver
from tempflow.forecast.cost import Shape, iteration_cost

FORKS = {
    "every step": {"forks": "all"},
    "a list": {"forks": [0, 3, 8]},
    "the first": {"forks": "first:2"},
    "the last": {"forks": [8]},
    "windows": {"forks": [0, 4, 7], "window": 2},
    "windows at every step": {"forks": "all", "window": 3},
    "windows of one sibling": {"forks": [1, 5], "window": 3, "siblings": 1},
    "chains": {"forks": [0], "window": "rest", "siblings": 1},
    "forks of each prompt": {"forks": "random:3", "draw": "prompt"},
    "windows of each prompt": {"forks": "first:5", "take": 2, "draw": "prompt", "window": 3},
    "a sliding window": {"draw": "slide", "every": 2, "window": 4},
    "a sliding fork": {"forks": [2, 5, 7], "draw": "slide"},
    "merged steps": {"forks": [0, 2, 5], "jump": [1, 2, 3]},
    "merged steps in windows": {"forks": [0, 1, 3], "jump": [3, 2, 2], "window": 2},
    "merged steps of each prompt": {"forks": [0, 2, 4], "jump": [1, 2, 4], "take": 2, "draw": "prompt"},
}


def one_image(policy, schedule, draw, conditioning, row, sibling, plan, fork, stride):
    """One image at batch size 1: the ODE to the fork, its stochastic steps, the ODE in strides to the end."""
    sigmas, sde, x, step = schedule.sigmas, schedule.sde, draw.initial_noise(policy.latent_shape)[row : row + 1], 0

    def velocity():
        return policy.velocity(x, sigmas[step].float().view(1), conditioning)

    while step < fork:
        x = x - (sigmas[step] - sigmas[step + 1]).float() * velocity()
        step += 1
    for _ in range(plan.window):
        noise = normal_like(x.expand(len(draw.slots), *x.shape[1:]), draw.step_keys(step), plan.siblings)[row, sibling]
        x = sde.x_coef[step].float() * x + sde.v_coef[step].float() * velocity() + sde.std[step].float() * noise
        step += int(schedule.jumps[step])
    while step < schedule.num_steps:
        following = min(step + stride, schedule.num_steps)
        x = x - (sigmas[step] - sigmas[following]).float() * velocity()
        step = following
    return x[0]


@torch.no_grad()
def nested_loops(policy, schedule, plan, strides=(1,), texts=TEXTS):
    """Tail by tail, fork by fork, trunk by trunk, sibling by sibling: (V, S, R, K, D...)."""
    draw, images = Draw.grid(7, 3, range(len(texts)), plan.noises), []
    rows = len(texts) * plan.noises
    for stride, fork, row, sibling in itertools.product(strides, range(plan.forks), range(rows), range(plan.siblings)):
        prompt = row // plan.noises
        conditioning, at = policy.encode([texts[prompt]]), int(plan.steps[fork, prompt])
        images.append(one_image(policy, schedule, draw, conditioning, row, sibling, plan, at, stride))
    return torch.stack(images).view(len(strides), plan.forks, rows, plan.siblings, *policy.latent_shape)


@pytest.mark.parametrize("strides", [(1,), (1, 2)], ids=["one tail", "two tails"])
@pytest.mark.parametrize("name", FORKS)
def test_chunks_equal_nested_loops(toy, name, strides):
    schedule, plan, _ = forked(**FORKS[name])
    found = finished(toy, schedule, plan, tails=[TailSolver(stride=stride) for stride in strides])
    assert torch.equal(found, nested_loops(toy, schedule, plan, strides))


def test_chunks_equal_nested_loops_on_the_sd3_pipeline(digits_policy):
    schedule, plan, _ = forked(forks=[1, 6], siblings=2, window=2)
    texts = ("a two at the top left", "three fours")
    branches = finished(digits_policy, schedule, plan, texts=texts)
    expected = nested_loops(digits_policy, schedule, plan, texts=texts)
    assert (branches - expected).abs().max() < 1e-4  # rounding of other batch shapes, carried through ten steps
    assert branches.std() > 0.3


@pytest.mark.parametrize("name", ["every step", "windows", "windows of each prompt", "merged steps"])
def test_chunk_sizes_do_not_matter(toy, name):
    schedule, plan, _ = forked(**FORKS[name])
    reference = finished(toy, schedule, plan, rows=6, tail_rows=1000)
    for rows, tail_rows in ((1, 1), (2, 7), (4, 24)):
        assert torch.equal(finished(toy, schedule, plan, rows=rows, tail_rows=tail_rows), reference)


def test_network_calls_are_those_of_the_plan(toy):
    """Tails advance in chunks of one size; the printed cost is what is spent."""
    schedule, plan, rule = forked(forks="all", siblings=4)
    finished(toy, schedule, plan, rows=2, tail_rows=24)
    cost = iteration_cost(rule, schedule, (TailSolver(),), Shape(6, 4, 6, 18))
    assert sum(toy.calls) == cost.trunk_rows + cost.tail_rows == 6 * 9 + 6 * 4 * 45
    assert set(toy.calls) == {2, 24} and cost.window_rows == 0
    assert cost.images == 6 * 9 * 4 and cost.learn_rows == 6 * 9


def test_network_calls_of_windows_are_those_of_the_plan(toy):
    """The first decision of a window costs nothing beyond the trunk, each later one a row per sibling."""
    schedule, plan, rule = forked(forks=[0, 4], window=3, siblings=4)
    rollout = explored(toy, schedule, plan)
    cost = iteration_cost(rule, schedule, (TailSolver(), TailSolver(stride=2)), Shape(6, 4, 6, 18))
    assert sum(toy.calls) == cost.trunk_rows + cost.window_rows == 6 * 5 + 2 * 2 * 24
    assert cost.learn_rows == sum(len(decision.steps) for decision in rollout.decisions) == 2 * (6 + 24 + 24)
    toy.calls.clear()
    engines = [EagerEngine(toy, 7), EagerEngine(toy, 7, TailSolver(stride=2))]
    images = sum(len(chunk.latents) for chunk in finish_branches(engines, rollout, schedule))
    assert sum(toy.calls) == cost.tail_rows == 24 * (7 + 3 + 4 + 2) and images == cost.images == 96


def test_siblings_share_the_trunk_state_and_differ_by_one_step(toy):
    schedule, plan, _ = forked(forks=[4], siblings=5)
    rollout = explored(toy, schedule, plan)
    (decision,) = rollout.decisions
    assert rollout.branches.shape == (1, 6, 5, 2, 3)
    assert len(rollout.branches[0, 0].flatten(1).unique(dim=0)) == 5
    assert decision.latents.shape == decision.velocity.shape == (6, 2, 3)
    velocity = toy.velocity(decision.latents, schedule.sigma_rows(decision.steps), toy.encode(TEXTS).repeat(2))
    assert torch.equal(velocity, decision.velocity)


def test_decisions_of_a_window_follow_one_another(toy):
    """Each begins where the one before it led, has the velocity there, and only the first is shared by siblings."""
    schedule, plan, _ = forked(forks=[1, 3], jump=[2, 2], window=3, siblings=4)
    rollout = explored(toy, schedule, plan)
    assert [decision.fork for decision in rollout.decisions] == [0, 0, 0, 1, 1, 1]
    steps = [decision.steps.unique().tolist() for decision in rollout.decisions]
    assert steps == [[1], [3], [5], [3], [5], [6]] and rollout.first_steps.unique(dim=1).tolist() == [[6], [7]]
    assert [(len(d.steps), d.siblings) for d in rollout.decisions[:3]] == [(6, 4), (24, 1), (24, 1)]
    shift = toy.encode(TEXTS).repeat(8)
    for before, after in itertools.pairwise(rollout.decisions[:3]):
        assert torch.equal(stochastic_step(before, schedule), after.latents)
        velocity = toy.velocity(after.latents, schedule.sigma_rows(after.steps), shift)
        assert torch.equal(velocity, after.velocity)
    assert torch.equal(stochastic_step(rollout.decisions[2], schedule), rollout.branches[0].flatten(0, 1))


@pytest.mark.parametrize("shape", [(6,), (2, 4), (3, 3)])
def test_keys_of_siblings_draw_the_noise_of_a_draw_of_siblings(shape):
    keys = Draw.grid(7, 3, range(3), 2).step_keys(4)
    together = normal_like(torch.empty(6, *shape), keys, 5)
    alone = normal_like(torch.empty(30, *shape), sibling_keys(keys, 5, together[0, 0].numel()), 1)
    assert torch.equal(alone.view(together.shape), together)


def test_draw_of_a_prompt_does_not_depend_on_its_rank(toy):
    everyone = Draw.grid(1, 5, range(4), 3)
    second = Draw.grid(1, 5, range(2, 4), 3)
    assert torch.equal(everyone.initial_noise((2, 3))[6:], second.initial_noise((2, 3)))
    assert torch.equal(everyone.step_keys(2)[6:], second.step_keys(2))
    for other in (Draw.grid(2, 5, range(4), 3), Draw.grid(1, 6, range(4), 3)):
        assert not torch.equal(everyone.step_keys(2), other.step_keys(2))
    assert not torch.equal(everyone.step_keys(2), everyone.step_keys(3))


def test_branches_travel_in_the_order_in_which_they_set_out(toy):
    """Longest tails first, so that those of a chunk end together; each says where it belongs."""
    schedule, plan, _ = forked(forks=[0, 3, 8], take=2, draw="prompt")
    rollout = explored(toy, schedule, plan)
    chunks = list(finish_branches([EagerEngine(toy, 5), EagerEngine(toy, 5)], rollout, schedule))
    places = torch.cat([chunk.places for chunk in chunks])
    count = rollout.first_steps.numel() * plan.siblings
    assert sorted(places.tolist()) == list(range(2 * count))
    setting_out = rollout.first_steps.flatten().repeat_interleave(plan.siblings)[places[:count]]
    assert setting_out.tolist() == sorted(setting_out.tolist()) and len(setting_out.unique()) == 3
    trunks = [row for chunk in chunks for row in chunk.trunks]
    assert trunks == [place // plan.siblings % 6 for place in places.tolist()]


def test_chunks_are_halved_once_where_memory_runs_out(toy, monkeypatch, capsys):
    """The branches of the chunk that did not fit are carried again, all to the ends they would have had."""
    schedule, plan, _ = forked(forks=[0, 3, 8])
    rollout, velocity, room = explored(toy, schedule, plan), toy.velocity, 5

    def short(latents, *arguments):
        if len(latents) > room:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        return velocity(latents, *arguments)

    def carried(**named):
        engine = EagerEngine(toy, 10)
        parts = list(finish_branches([engine], rollout, schedule, **named))
        order = torch.argsort(torch.cat([part.places for part in parts]))
        return engine.rows, torch.cat([part.latents for part in parts])[order]

    _, expected = carried()
    monkeypatch.setattr(toy, "velocity", short)
    rows, found = carried(may_halve=True)
    assert rows == 5 and torch.equal(found, expected) and "tails.rows" in capsys.readouterr().err
    with pytest.raises(torch.OutOfMemoryError):
        carried()
    room = 2  # halves are too large, too
    with pytest.raises(torch.OutOfMemoryError):
        carried(may_halve=True)


def test_decode_keeps_the_layout(toy):
    torch.manual_seed(4)
    latents = torch.randn(2, 3, 4, 2, 3)
    images = decode_branches(toy, latents, 5).images
    assert images.shape == (2, 3, 4, 3, 2, 3) and images.dtype == torch.uint8
    assert torch.equal(images[1, 2, 3], toy.decode(latents[1, 2, 3:])[0])


def test_cost_of_the_paper_setting():
    """T = 10, K = 6, every step: 9 trunk and 270 tail evaluations and 54 images per initial noise."""
    schedule, _, rule = forked(forks="all", siblings=6)
    cost = iteration_cost(rule, schedule, (TailSolver(),), Shape(1, 6, 16 * 64 * 64, 3 * 512 * 512))
    assert (cost.trunk_rows, cost.tail_rows, cost.learn_rows, cost.images) == (9, 270, 9, 54)
    assert "54 images" in cost.describe(2) and "576 in all" in cost.describe(2)
    assert "288 in all" in cost.describe(1) and "windows" not in cost.describe(1)
