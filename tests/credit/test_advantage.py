"""Seed, prompt and batch groups against their definitions."""

import pytest
import torch

from tempflow.credit.advantage import combined_advantages, group_advantages


def by_hand(rewards, groups):
    """Normalises each listed group of (step, row, sibling) places on its own."""
    advantages = torch.zeros_like(rewards)
    for places in groups:
        values = torch.stack([rewards[place] for place in places])
        for place, value in zip(places, values, strict=True):
            advantages[place] = (value - values.mean()) / (values.std(correction=0) + 1e-4)
    return advantages


GROUPS = {
    "seed": [[(s, r, k) for k in range(3)] for s in range(2) for r in range(4)],
    "prompt": [[(s, r, k) for r in rows for k in range(3)] for s in range(2) for rows in ((0, 1), (2, 3))],
    "batch": [[(s, r, k) for r in range(4) for k in range(3)] for s in range(2)],
}


@pytest.mark.parametrize("group", GROUPS)
def test_groups_are_what_they_say(group):
    rewards = torch.randn(2, 4, 3)
    credit = group_advantages(rewards, 2, group)
    assert torch.allclose(credit.advantages, by_hand(rewards, GROUPS[group]), atol=1e-6)
    assert credit.informative.all()


def test_seed_groups_ignore_what_siblings_share():
    """A prompt or noise that is easier for all siblings gives them no credit."""
    rewards = torch.randn(3, 4, 6)
    offset = torch.randn(3, 4, 1) * 10
    assert torch.allclose(
        group_advantages(rewards, 2, "seed").advantages, group_advantages(rewards + offset, 2, "seed").advantages,
        atol=1e-4,
    )  # fmt: skip


def test_groups_without_spread_are_masked():
    rewards = torch.randn(2, 4, 3)
    rewards[1, 2] = 0.3
    credit = group_advantages(rewards, 2, "seed")
    assert not credit.informative[1, 2] and credit.informative.sum() == 7
    assert (credit.groups, credit.masked) == (8, 1)
    assert not credit.advantages[1, 2].any()
    assert group_advantages(rewards, 2, "prompt").informative.all()
    equal = group_advantages(torch.ones(2, 4, 3), 2, "batch")
    assert not equal.informative.any() and (equal.groups, equal.masked) == (2, 2)


def test_rounding_noise_is_no_spread():
    rewards = torch.full((1, 1, 3), 0.9)
    rewards[0, 0, 1] += 6e-8
    assert not group_advantages(rewards, 1, "seed").informative.any()


def test_global_std_keeps_the_size_of_differences():
    rewards = torch.stack((torch.randn(4, 6), 0.01 * torch.randn(4, 6)))
    credit = group_advantages(rewards, 2, "seed", "global")
    expected = (rewards - rewards.mean(2, keepdim=True)) / (rewards.std(correction=0) + 1e-4)
    assert torch.allclose(credit.advantages, expected.clamp(-5, 5), atol=1e-6)
    assert credit.advantages[1].abs().max() < 0.2


def test_advantages_are_clipped():
    rewards = torch.zeros(1, 1, 101)
    rewards[0, 0, 0] = 1
    assert group_advantages(rewards, 1, "seed", clip=5.0).advantages.max() == 5
    assert group_advantages(rewards, 1, "seed", clip=50.0).advantages.max() == pytest.approx(10, abs=0.1)


NAN = float("nan")


@pytest.mark.parametrize("group", GROUPS)
def test_missing_rewards_leave_their_group_as_if_they_had_not_been_asked(group):
    """The known siblings' advantages are those of a group that holds only them."""
    rewards = torch.randn(2, 4, 3)
    missing = [(0, 1, 2), (1, 0, 0), (1, 3, 1)]
    for place in missing:
        rewards[place] = NAN
    groups = [[place for place in places if place not in missing] for places in GROUPS[group]]
    credit = group_advantages(rewards, 2, group)
    assert torch.allclose(credit.advantages, by_hand(rewards, groups), atol=1e-5)
    assert credit.informative.all() and not any(credit.advantages[place] for place in missing)


def test_a_group_with_fewer_than_two_rewards_is_masked():
    rewards = torch.randn(1, 4, 3)
    rewards[0, 1, :2] = NAN
    rewards[0, 2] = NAN
    credit = group_advantages(rewards, 2, "seed")
    assert credit.informative[0].tolist() == [True, False, False, True] and credit.masked == 2
    assert credit.advantages.isfinite().all() and not credit.advantages[0, 1:3].any()
    assert group_advantages(rewards, 2, "seed", "global").advantages.isfinite().all()


def test_global_std_is_that_of_the_known():
    rewards = torch.randn(2, 4, 3)
    rewards[0, 0, 0] = NAN
    known = rewards[~rewards.isnan()]
    found = group_advantages(rewards, 2, "seed", "global").advantages[1, 1]
    assert torch.allclose(found, (rewards[1, 1] - rewards[1, 1].mean()) / (known.std(correction=0) + 1e-4))


def test_several_rewards_are_summed_or_normalised_one_by_one():
    rewards, weights = torch.randn(2, 3, 4, 6) * torch.tensor([1.0, 100.0]).view(2, 1, 1, 1), torch.tensor([1.0, 0.5])
    summed = combined_advantages(rewards, weights, "sum", 2, "seed")
    assert torch.equal(summed.advantages, group_advantages(rewards[0] + 0.5 * rewards[1], 2, "seed").advantages)
    apart = combined_advantages(rewards, weights, "advantages", 2, "seed")
    first, second = (group_advantages(part, 2, "seed").advantages for part in rewards)
    assert torch.allclose(apart.advantages, first + 0.5 * second)
    assert torch.corrcoef(torch.stack((summed.advantages.flatten(), first.flatten())))[0, 1] < 0.3  # drowned


def test_a_reward_missing_counts_by_itself_or_in_the_sum():
    rewards, weights = torch.randn(2, 1, 2, 4), torch.tensor([1.0, 2.0])
    rewards[1, 0, 0, 3] = NAN
    rewards[1, 0, 1] = 0.5  # tells nothing here, while the first does
    summed = combined_advantages(rewards, weights, "sum", 1, "seed")
    assert summed.advantages[0, 0, 3] == 0 and summed.advantages[0, 0, :3].all()
    apart = combined_advantages(rewards, weights, "advantages", 1, "seed")
    assert apart.advantages[0, 0, 3] == group_advantages(rewards[0], 1, "seed").advantages[0, 0, 3]
    assert apart.informative.all() and apart.masked == 0
