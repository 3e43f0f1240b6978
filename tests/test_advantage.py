"""Seed, prompt and batch groups against their definitions."""

import pytest
import torch

from tempflow.advantage import group_advantages


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
