"""Every random choice is a function of who draws it."""

import pytest
import torch
from tempflow_kernels import normal_like

from tempflow.common.draws import EVALUATION, FORKS, NOISE, PROMPTS, Draw, shuffled


def test_permutations_are_complete_and_differ_by_seed_purpose_and_turn():
    order = shuffled(200, 42, PROMPTS, 0)
    assert sorted(order) == list(range(200)) and order != list(range(200))
    others = [shuffled(200, 43, PROMPTS, 0), shuffled(200, 42, FORKS, 0), shuffled(200, 42, PROMPTS, 1)]
    assert all(order != other for other in others)
    assert order == shuffled(200, 42, PROMPTS, 0)


def test_permutations_are_uniform():
    """Each item comes first about equally often: 2,000 draws of 5, five standard deviations around 400."""
    counts = torch.bincount(torch.tensor([shuffled(5, 7, FORKS, turn)[0] for turn in range(2000)]), minlength=5)
    assert (counts - 400).abs().max() < 5 * (2000 * 0.2 * 0.8) ** 0.5


def test_a_grid_goes_prompt_by_prompt():
    draw = Draw.grid(1, 2, range(3, 5), 2)
    assert draw.slots.tolist() == [3, 3, 4, 4] and draw.noises.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("field", ["run_seed", "iteration", "slots", "seeds", "step"])
def test_each_part_of_the_identity_changes_the_noise(field):
    identity = {"run_seed": 1, "iteration": 2, "slots": 3, "seeds": 0, "step": 4}

    def noise(values):
        slot, seed = torch.tensor([values["slots"]]), torch.tensor([values["seeds"]])
        draw = Draw(values["run_seed"], values["iteration"], slot, seed)
        return draw.initial_noise((8,)) if field != "step" else draw.step_keys(values["step"])

    assert torch.equal(noise(identity), noise(identity))
    assert not torch.equal(noise(identity), noise({**identity, field: identity[field] + 1}))


def test_initial_noise_and_sibling_noise_never_share_a_key():
    draws = [Draw.grid(5, iteration, range(20), 3) for iteration in (0, 1, 2, EVALUATION)]
    keys = torch.cat([draw.step_keys(step)[:, 0] for draw in draws for step in range(10)])
    assert len(keys.unique()) == len(keys) == 4 * 10 * 60
    for draw in draws:
        initial = draw.initial_noise((4, 3))
        for step in range(10):  # of one draw, the first sibling's noise is what the key gives
            siblings = normal_like(torch.empty(60, 4, 3), draw.step_keys(step), 2)
            assert not (siblings == initial[:, None]).any()


def test_rows_may_be_at_steps_of_their_own():
    draw, steps = Draw.grid(5, 1, range(2), 2), torch.tensor([0, 3, 3, 7])
    found = draw.step_keys(steps)
    assert all(torch.equal(found[row], draw.step_keys(step)[row]) for row, step in enumerate(steps.tolist()))


def test_initial_noise_is_standard_normal():
    noise = Draw.grid(9, 0, range(50), 4).initial_noise((16, 16, 8)).double()
    count = noise.numel()
    assert abs(noise.mean()) < 5 / count**0.5
    assert abs(noise.var() - 1) < 5 * (2 / count) ** 0.5
    rows = noise.flatten(1)
    correlation = (rows @ rows.T / rows.shape[1]).fill_diagonal_(0)
    assert correlation.abs().max() < 6 / rows.shape[1] ** 0.5


def test_purposes_are_apart():
    assert len({NOISE, FORKS, PROMPTS}) == 3
