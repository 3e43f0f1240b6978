"""Where trajectories fork: the forms of explore.forks, what is drawn when, and what is refused."""

from itertools import pairwise

import pytest
import torch

from tempflow.common.errors import BadInput
from tempflow.explore.plan import ForkRule, Forks, Plan, read_forks
from tempflow.settings.fields import ExploreConfig

EVERY = tuple(range(9))


def rule_of(num_steps: int = 10, **explore) -> ForkRule:
    return read_forks(ExploreConfig(**explore), num_steps)


def refusal(num_steps: int = 10, **explore) -> BadInput:
    with pytest.raises(BadInput) as caught:
        rule_of(num_steps, **explore)
    return caught.value


@pytest.mark.parametrize(
    ("explore", "pool", "take"),
    [
        ({"forks": "all"}, EVERY, 9),
        ({"forks": [4, 0, 2, 4]}, (0, 2, 4), 3),
        ({"forks": [8]}, (8,), 1),
        ({"forks": "first:1"}, (0,), 1),
        ({"forks": "first:9"}, EVERY, 9),
        ({"forks": "first:50%"}, EVERY[:5], 5),
        ({"forks": "first:39%"}, EVERY[:3], 3),  # 3.9 of 10 steps, rounded down
        ({"forks": "first:1%"}, (0,), 1),
        ({"forks": "random:3"}, EVERY, 3),
        ({"forks": "random:9"}, EVERY, 9),
        ({"forks": "first:50%", "take": 1}, EVERY[:5], 1),
        ({"forks": [1, 5, 7], "take": 2}, (1, 5, 7), 2),
        ({"draw": "slide"}, EVERY, 1),
        ({"forks": [3, 6], "draw": "slide", "take": 1}, (3, 6), 1),
        ({"forks": "first:100%"}, EVERY, 9),
    ],
)
def test_forms_of_forks(explore, pool, take):
    forks = rule_of(**explore).forks
    assert (forks.pool, forks.take, forks.draw) == (pool, take, explore.get("draw", "iteration"))


@pytest.mark.parametrize(
    ("explore", "pool", "take"),
    [
        ({"forks": "all", "window": 4}, EVERY[:6], 6),
        ({"forks": "all", "window": "rest"}, (0,), 1),
        ({"forks": "first:7", "window": 3}, EVERY[:7], 7),
        ({"forks": "random:3", "window": 4}, EVERY[:6], 3),
        ({"forks": "all", "jump": 3}, EVERY[:7], 7),
        ({"forks": "all", "jump": 2, "window": 2}, EVERY[:6], 6),
        ({"draw": "slide", "window": 4}, EVERY[:6], 1),
    ],
)
def test_named_forks_leave_room_for_their_windows(explore, pool, take):
    """No window passes step 8 of 10, so that every branch has a tail."""
    rule = rule_of(**explore)
    assert (rule.forks.pool, rule.forks.take) == (pool, take)
    assert rule.after(pool[-1]) <= 9 and max(step + jump for step, jump in enumerate(rule.jumps)) <= 10


def test_windows_and_jumps_add_up():
    rule = rule_of(forks=[0, 2, 5], jump=[1, 3, 2], window=2)
    assert rule.jumps == (1, 1, 3, 1, 1, 2, 1, 1, 1, 1)
    assert [rule.after(step) for step in (0, 2, 5)] == [2, 7, 8]
    assert rule.trained() == [0, 1, 2, 5, 7]
    assert rule_of(forks=[3], window="rest").window == 6 and rule_of(forks="all").trained() == list(EVERY)
    assert rule_of(forks="random:2", window=3).trained() == list(EVERY)


@pytest.mark.parametrize(
    "forks",
    [[9], [-1], [0, 12], [], "first:0", "first:10", "random:0", "random:10", "random:50%", "last:2",
     "0,1", "some", "all:3"],
    ids=str,
)  # fmt: skip
def test_forks_outside_the_schedule_are_refused(forks):
    assert refusal(forks=forks).field == "explore.forks"


@pytest.mark.parametrize(
    ("explore", "field"),
    [
        ({"forks": [0, 7], "window": 3}, "explore.window"),
        ({"forks": [0, 3], "window": "rest"}, "explore.window"),
        ({"forks": "all", "window": 10}, "explore.window"),
        ({"forks": [0, 7], "jump": [1, 3]}, "explore.jump"),
        ({"forks": [8], "jump": 2}, "explore.jump"),
        ({"forks": [3, 6], "jump": [3, 3], "window": 2}, "explore.window"),
        ({"forks": [0, 4], "jump": [1, 2, 3]}, "explore.jump"),
        ({"forks": "all", "jump": [1, 2]}, "explore.jump"),
        ({"forks": [0, 4], "take": 3}, "explore.take"),
        ({"forks": "all", "take": 10}, "explore.take"),
        ({"forks": "all", "window": 4, "take": 7}, "explore.take"),
        ({"forks": "all", "draw": "slide", "take": 2}, "explore.take"),
        ({"forks": "first:8", "window": 3}, "explore.window"),
        ({"forks": "random:7", "window": 4}, "explore.forks"),
    ],
    ids=str,
)
def test_windows_that_leave_no_tail_and_draws_of_too_many_are_refused(explore, field):
    assert refusal(**explore).field == field


def test_the_longest_window_that_leaves_a_tail_is_taken():
    assert rule_of(forks=[0], window=9).after(0) == 9 and refusal(forks=[0], window=10).field == "explore.window"
    assert rule_of(forks=[7], jump=2).after(7) == 9 and rule_of(forks=[8]).after(8) == 9
    assert rule_of(2, forks="all").forks.pool == (0,)


def test_random_forks_are_a_fresh_subset_each_iteration():
    forks = rule_of(forks="random:3").forks
    drawn = [tuple(forks.at(42, iteration, 2)[:, 0].tolist()) for iteration in range(300)]
    assert all(len(steps) == 3 and list(steps) == sorted(set(steps)) for steps in drawn)
    counts = [sum(step in steps for steps in drawn) for step in EVERY]
    assert min(counts) > 60 and max(counts) < 140
    assert drawn == [tuple(forks.at(42, iteration, 2)[:, 1].tolist()) for iteration in range(300)]  # all prompts alike
    assert drawn != [tuple(forks.at(43, iteration, 2)[:, 0].tolist()) for iteration in range(300)]


def test_neighbouring_iterations_draw_apart():
    """3 of 9 come up the same twice running once in 84 times."""
    forks = rule_of(forks="random:3").forks
    drawn = [forks.at(42, iteration, 1).tolist() for iteration in range(300)]
    assert sum(first == second for first, second in pairwise(drawn)) < 15
    assert sum(first == second for first, second in zip(drawn[::2], drawn[1::2], strict=True)) < 10


def test_each_prompt_has_forks_of_its_own():
    """Columns differ; a part of the prompts sees what all see; and no iteration repeats another's."""
    forks = rule_of(forks="first:50%", take=1, draw="prompt").forks
    steps = torch.stack([forks.at(42, iteration, 4) for iteration in range(200)])  # (I, 1, P)
    assert steps.shape == (200, 1, 4) and steps.unique().tolist() == [0, 1, 2, 3, 4]
    flat = steps.flatten()
    assert flat.bincount(minlength=5).min() > 110 and flat.bincount(minlength=5).max() < 210
    for apart in range(1, 6):  # other prompts, later iterations: alike one time in five
        assert 0.1 < (flat[:-apart] == flat[apart:]).float().mean() < 0.3
    assert torch.equal(Plan(steps[3], 1, 2, 5).of(range(1, 3)).steps, steps[3][:, 1:3])


def test_all_of_a_pool_need_no_draw():
    for draw in ("iteration", "prompt"):
        assert rule_of(forks=[0, 4], draw=draw).forks.at(1, 5, 3).tolist() == [[0, 0, 0], [4, 4, 4]]


@pytest.mark.parametrize(("every", "expected"), [(1, [2, 5, 7, 2, 5, 7, 2]), (3, [2, 2, 2, 5, 5, 5, 7])])
def test_sliding_forks_go_through_their_steps_in_order(every, expected):
    forks = rule_of(forks=[2, 5, 7], draw="slide", every=every).forks
    assert [forks.at(1, iteration, 2).tolist() for iteration in range(7)] == [[[step] * 2] for step in expected]


def test_a_plan_repeats_forks_for_the_noises_of_a_prompt():
    steps = Forks((0, 3, 6, 8), 2, "prompt").at(1, 2, 3)
    plan = Plan(steps, 1, 4, 6)
    assert plan.forks == 2 and plan.trunk_steps().shape == (2, 12)
    assert torch.equal(plan.trunk_steps()[:, 4:8], steps[:, 1:2].expand(2, 4))
    assert torch.equal(plan.of(range(2, 3)).trunk_steps(), plan.trunk_steps()[:, 8:])
