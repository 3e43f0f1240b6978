"""Advantages of groups, deviations, several rewards and several tails, against their definitions."""

import pytest
import torch
from torch import Tensor

from tempflow.credit.advantage import Comparison, Credit, give_credit

NAN = float("nan")
ONE = torch.ones(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(6)


def credit_of(rewards: Tensor, noises: int = 2, **comparison) -> Credit:
    """Of one reward (S, R, K) and one tail."""
    return give_credit(rewards[None, None], ONE, Comparison(**{"noises": noises, "group": "seed"} | comparison))


def spread_out(*shape: int) -> Tensor:
    """Rewards in no order, of which no two are within 1: every group of them differs, and none is far off."""
    count = torch.Size(shape).numel()
    return (torch.randperm(count).view(shape) + torch.rand(shape) / 2) / 4


def by_hand(rewards, groups, correction=0, epsilon=1e-4):
    """Normalises each listed group of (step, row, sibling) places on its own."""
    advantages = torch.zeros_like(rewards)
    for places in groups:
        values = torch.stack([rewards[place] for place in places])
        for place, value in zip(places, values, strict=True):
            advantages[place] = (value - values.mean()) / (values.std(correction=correction) + epsilon)
    return advantages


GROUPS = {
    "seed": [[(s, r, k) for k in range(3)] for s in range(2) for r in range(4)],
    "prompt": [[(s, r, k) for r in rows for k in range(3)] for s in range(2) for rows in ((0, 1), (2, 3))],
    "batch": [[(s, r, k) for r in range(4) for k in range(3)] for s in range(2)],
}
OWN_STDS = {"group": (0, 1e-4), "unbiased": (1, 1e-8)}


@pytest.mark.parametrize("std", OWN_STDS)
@pytest.mark.parametrize("group", GROUPS)
def test_groups_are_what_they_say(group, std):
    rewards = spread_out(2, 4, 3)
    credit = credit_of(rewards, group=group, std=std)
    assert torch.allclose(credit.advantages, by_hand(rewards, GROUPS[group], *OWN_STDS[std]), atol=1e-6)
    assert credit.informative.all() and credit.informative.shape == (2, 4) and credit.masked == 0
    assert credit.groups == len(GROUPS[group])


def test_chains_of_one_prompt_are_compared_with_one_another():
    """Flow-GRPO: one fork, K = 1, and the group is the N noises of a prompt."""
    rewards = spread_out(1, 8, 1)
    credit = credit_of(rewards, 4, group="prompt", std="global")
    groups = rewards.view(2, 4)
    expected = (groups - groups.mean(1, keepdim=True)) / (rewards.std(correction=0) + 1e-4)
    assert torch.allclose(credit.advantages.view(2, 4), expected, atol=1e-6) and credit.groups == 2


def test_seed_groups_ignore_what_siblings_share():
    """A prompt or noise that is easier for all siblings gives them no credit."""
    rewards = spread_out(3, 4, 6)
    offset = torch.randn(3, 4, 1) * 10
    assert torch.allclose(credit_of(rewards).advantages, credit_of(rewards + offset).advantages, atol=1e-4)


def test_groups_without_spread_are_masked():
    rewards = spread_out(2, 4, 3)
    rewards[1, 2] = 0.3
    credit = credit_of(rewards)
    assert not credit.informative[1, 2] and credit.informative.sum() == 7
    assert (credit.groups, credit.masked) == (8, 1)
    assert not credit.advantages[1, 2].any()
    assert credit_of(rewards, group="prompt").informative.all()
    equal = credit_of(torch.ones(2, 4, 3), group="batch")
    assert not equal.informative.any() and (equal.groups, equal.masked) == (2, 2)


@pytest.mark.parametrize("std", ["group", "global", "unbiased"])
def test_rounding_noise_is_no_spread_and_a_small_difference_is(std):
    rewards = torch.full((1, 1, 3), 0.9)
    rewards[0, 0, 1] += 6e-8
    assert not credit_of(rewards, 1, std=std).informative.any()
    rewards[0, 0, 1] = 0.9001
    credit = credit_of(rewards, 1, std=std)
    assert credit.informative.all() and credit.advantages[0, 0, 1] > 0.3


def test_global_std_spans_one_fork_over_all_prompts():
    """Forks of great and small differences are divided each by its own, and within a fork sizes are kept."""
    rewards = spread_out(2, 4, 6) * torch.tensor([1.0, 0.01]).view(2, 1, 1)
    rewards[0, 2:] *= 0.1
    credit = credit_of(rewards, std="global")
    scale = torch.stack([fork.std(correction=0) + 1e-4 for fork in rewards]).view(2, 1, 1)
    expected = (rewards - rewards.mean(2, keepdim=True)) / scale
    assert torch.allclose(credit.advantages, expected.clamp(-5, 5), atol=1e-5)
    assert credit.advantages[0, 2:].abs().max() < 0.5 < credit.advantages[1].abs().max()


def test_advantages_are_clipped():
    rewards = torch.zeros(1, 1, 101)
    rewards[0, 0, 0] = 1
    assert credit_of(rewards, 1, clip=5.0).advantages.max() == 5
    assert credit_of(rewards, 1, clip=50.0).advantages.max() == pytest.approx(10, abs=0.1)
    assert credit_of(-rewards, 1, clip=5.0).advantages.min() == -5


@pytest.mark.parametrize("std", OWN_STDS)
@pytest.mark.parametrize("group", GROUPS)
def test_missing_rewards_leave_their_group_as_if_they_had_not_been_asked(group, std):
    """The known siblings' advantages are those of a group that holds only them."""
    rewards = spread_out(2, 4, 3)
    missing = [(0, 1, 2), (1, 0, 0), (1, 3, 1)]
    for place in missing:
        rewards[place] = NAN
    groups = [[place for place in places if place not in missing] for places in GROUPS[group]]
    credit = credit_of(rewards, group=group, std=std)
    assert torch.allclose(credit.advantages, by_hand(rewards, groups, *OWN_STDS[std]), atol=1e-5)
    assert credit.informative.all() and not any(credit.advantages[place] for place in missing)


@pytest.mark.parametrize("std", ["group", "global", "unbiased"])
def test_a_group_with_fewer_than_two_rewards_is_masked(std):
    rewards = spread_out(1, 4, 3)
    rewards[0, 1, :2] = NAN
    rewards[0, 2] = NAN
    credit = credit_of(rewards, std=std)
    assert credit.informative[0].tolist() == [True, False, False, True] and credit.masked == 2
    assert credit.advantages.isfinite().all() and not credit.advantages[0, 1:3].any()


def test_global_std_is_that_of_the_known():
    rewards = spread_out(2, 4, 3)
    rewards[0, 0, 0] = NAN
    advantages = credit_of(rewards, std="global").advantages
    for fork in (0, 1):
        known = rewards[fork][~rewards[fork].isnan()]
        expected = (rewards[fork, 1] - rewards[fork, 1].mean()) / (known.std(correction=0) + 1e-4)
        assert torch.allclose(advantages[fork, 1], expected, atol=1e-6)


def several(rewards: Tensor, weights: Tensor, noises: int = 2, **comparison) -> Credit:
    """Of M rewards (M, S, R, K) of one tail."""
    return give_credit(rewards[None], weights, Comparison(**{"noises": noises, "group": "seed"} | comparison))


def test_several_rewards_are_summed_or_normalised_one_by_one():
    rewards = torch.stack((spread_out(3, 4, 6), 100 * spread_out(3, 4, 6)))
    weights = torch.tensor([1.0, 0.5])
    summed = several(rewards, weights, combine="sum")
    assert torch.equal(summed.advantages, credit_of(rewards[0] + 0.5 * rewards[1]).advantages)
    apart = several(rewards, weights, combine="advantages")
    first, second = (credit_of(part).advantages for part in rewards)
    assert torch.allclose(apart.advantages, first + 0.5 * second)
    # the sum follows the reward of a hundredfold spread, and the other is drowned
    assert (summed.advantages - second).abs().max() < 0.1 < (apart.advantages - 1.5 * second).abs().max()


def test_the_sum_of_advantages_is_clipped_and_not_its_parts():
    """6 - 3 = 3 stays, where parts limited to 4 would give 1; 6 + 6 becomes 4."""
    peak = torch.zeros(1, 1, 37)
    peak[0, 0, 0] = 1  # an advantage of 6
    for second, expected in ((-0.5, 3.0), (1.0, 4.0)):
        credit = several(torch.stack((peak, peak)), torch.tensor([1.0, second]), 1, combine="advantages", clip=4.0)
        assert credit.advantages[0, 0, 0].item() == pytest.approx(expected, abs=0.01)


def test_a_reward_missing_counts_by_itself_or_in_the_sum():
    rewards, weights = torch.stack((spread_out(1, 2, 4), spread_out(1, 2, 4))), torch.tensor([1.0, 2.0])
    rewards[1, 0, 0, 3] = NAN
    rewards[1, 0, 1] = 0.5  # tells nothing here, while the first does
    summed = several(rewards, weights, 1, combine="sum")
    alone = credit_of(rewards[0] + 2 * rewards[1], 1)
    assert torch.equal(summed.advantages, alone.advantages)
    assert summed.advantages[0, 0, 3] == 0 and alone.advantages[0, 0, :3].abs().max() > 0.5
    apart = several(rewards, weights, 1, combine="advantages")
    assert apart.advantages[0, 0, 3] == credit_of(rewards[0], 1).advantages[0, 0, 3]
    assert apart.informative.all() and apart.masked == 0


def test_a_reward_without_weight_has_no_say_even_where_it_is_missing():
    rewards = torch.stack((spread_out(1, 2, 4), torch.full((1, 2, 4), NAN)))
    assert torch.equal(several(rewards, torch.tensor([1.0, 0.0]), 1).advantages, credit_of(rewards[0], 1).advantages)


@pytest.mark.parametrize("combine", ["sum", "advantages"])
@pytest.mark.parametrize("std", ["group", "global", "unbiased"])
def test_several_tails_add_up(combine, std):
    """Each tail is normalised by itself, its rewards mixed as they are with one tail; limits hold for the sum."""
    rewards, weights = torch.stack([spread_out(2, 3, 4, 5) for _ in range(2)]), torch.tensor([1.0, 0.3])
    rewards[1] *= 50
    comparison = Comparison(2, "seed", std, 1e9, combine)
    both = give_credit(rewards, weights, comparison)
    apart = [give_credit(tail[None], weights, comparison).advantages for tail in rewards]
    assert torch.allclose(both.advantages, apart[0] + apart[1], atol=1e-5)
    limited = give_credit(rewards, weights, Comparison(2, "seed", std, 1.0, combine)).advantages
    assert torch.allclose(limited, (apart[0] + apart[1]).clamp(-1, 1), atol=1e-5) and limited.abs().max() == 1


def test_a_group_tells_something_if_one_of_its_tails_does():
    rewards = torch.stack((spread_out(2, 4, 3), spread_out(2, 4, 3)))
    rewards[0, 0, 1] = 0.5
    rewards[:, 1, 2] = 0.5
    rewards[1, 1, 3, 0] = NAN
    credit = give_credit(rewards[:, None], ONE, Comparison(2, "seed"))
    assert credit.informative[0].all() and credit.informative[1].tolist() == [True, True, False, True]
    assert (credit.groups, credit.masked) == (8, 1)
    fine, coarse = (credit_of(tail).advantages for tail in rewards)
    assert torch.equal(credit.advantages[0, 1], coarse[0, 1])
    assert credit.advantages[1, 3, 0] == fine[1, 3, 0] != 0
