"""Branches meet their own prompt, in whatever order they travel, whether scored in turn or beside the sampler."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from tempflow.common.clock import PhaseClock
from tempflow.common.errors import BadInput
from tempflow.credit.advantage import give_credit
from tempflow.credit.scoring import ScoreQueue, collect_rewards
from tempflow.credit.statistics import reward_figures
from tempflow.explore.rollout import FinishedBranches
from tempflow.parallel.ranks import Ranks
from tempflow.prompts import Prompt
from tempflow.rewards.panel import Panel
from tempflow.rewards.scorer import Scorer

PROMPTS = [Prompt(str(number)) for number in range(11)]


def scorer(function, rows=2, parallel=0, name="mine"):
    return Scorer("reward.name", name, function, rows, parallel)


def queue(toy, function, parallel, rows=2):
    clock = PhaseClock(toy.device)
    return ScoreQueue(toy, scorer(function, rows, parallel), rows, clock, overlap=True), clock


def branches(latents, places, trunks):
    return FinishedBranches(latents, list(trunks), torch.as_tensor(places))


def two(number=0):
    return branches(torch.zeros(2, 2, 3), [2 * number, 2 * number + 1], [0, 1])


def number_of_prompt(images, prompts):
    """What the picture shows plus a tenth of what the prompt says, so that either being out of place is seen."""
    return [image[0, 0, 0].item() + float(prompt.text) / 10 for image, prompt in zip(images, prompts, strict=True)]


def darkness(images, prompts):
    return -images[:, 0, 0, 0].float()


@pytest.mark.parametrize("parallel", [0, 1, 4])
def test_rewards_come_in_the_order_of_the_branches(toy, parallel):
    scores, clock = queue(toy, number_of_prompt, parallel)
    torch.manual_seed(3)
    for _ in range(2):  # a queue serves many iterations
        latents = torch.randn(11, 2, 3)
        for part in (slice(0, 5), slice(5, 10), slice(10, 11)):
            places = range(11)[part]
            scores.submit(branches(latents[part], places, places), PROMPTS)
        expected = toy.decode(latents)[:, 0, 0, 0] + torch.arange(11) / 10
        assert torch.allclose(scores.collect(), expected)
    assert set(clock.read()) == {"decode", "reward"}


@pytest.mark.parametrize("parallel", [0, 4])
def test_rewards_return_to_their_places_whatever_order_branches_travelled_in(toy, parallel):
    """Of one scorer (B,), of a panel (M, B); a trunk's prompt is found by the trunk."""
    torch.manual_seed(3)
    latents, order = torch.randn(12, 2, 3), torch.randperm(12)
    trunks = torch.arange(12) // 3 % 4  # 4 trunks of 3 siblings
    shown = toy.decode(latents)[:, 0, 0, 0]
    expected = shown + trunks / 10
    both = {"a": scorer(number_of_prompt, 5, parallel), "b": scorer(darkness, 5, parallel)}
    panel = Panel(both, torch.tensor([1.0, 2.0]))
    for reward, rewards in ((both["a"], expected), (panel, torch.stack((expected, -shown.float())))):
        scores = ScoreQueue(toy, reward, 3, PhaseClock(toy.device), overlap=True)
        for part in order.split(5):
            scores.submit(branches(latents[part], part, trunks[part].tolist()), PROMPTS[:4])
        assert torch.allclose(scores.collect(), rewards)


def test_rewards_of_all_tails_and_scorers_have_their_axes(toy):
    """(V, M, S, R, K), gathered over processes along R, prompt by prompt."""
    tails, forks, trunks, siblings = shape = (2, 3, 4, 5)
    count = tails * forks * trunks * siblings
    values = torch.arange(float(count)).view(shape)
    panel = Panel({"a": scorer(None), "b": scorer(None)}, torch.ones(2))
    scores = SimpleNamespace(collect=lambda: torch.stack((values.flatten(), -values.flatten())),
                             settle_lost=lambda ranks: None)  # fmt: skip
    alone = collect_rewards(scores, panel, Ranks(0, 1, toy.device), shape)
    assert torch.equal(alone, torch.stack((values, -values), 1))

    class Two(Ranks):
        def gather(self, tensor, dim):
            other = tensor + 1000 if tensor.dtype == torch.float32 else tensor
            return torch.cat((tensor, other), dim)

    gathered = collect_rewards(scores, panel, Two(0, 2, toy.device), shape)
    assert gathered.shape == (2, 2, 3, 8, 5)
    assert torch.equal(gathered[:, 0, :, :4], values) and torch.equal(gathered[:, 0, :, 4:], values + 1000)


def test_a_scorer_without_any_opinion_is_named(toy):
    panel = Panel({"a": scorer(None), "b": scorer(None, name="silent")}, torch.ones(2))
    rewards = torch.stack((torch.zeros(6), torch.full((6,), torch.nan)))
    with pytest.raises(BadInput) as caught:
        scores = SimpleNamespace(collect=lambda: rewards, settle_lost=lambda ranks: None)
        collect_rewards(scores, panel, Ranks(0, 1, toy.device), (1, 1, 2, 3))
    assert (caught.value.field, caught.value.value) == ("reward.name", "silent")


def test_scoring_elsewhere_goes_on_beside_the_sampler(toy):
    """Four chunks wait for another machine at once, while this thread goes on."""
    together = threading.Barrier(4, timeout=10)

    def elsewhere(images, prompts):
        together.wait()  # returns only when four calls are in flight
        return torch.zeros(len(images))

    scores, _ = queue(toy, elsewhere, parallel=4)
    start = time.perf_counter()
    for number in range(4):
        scores.submit(two(number), PROMPTS)
    assert time.perf_counter() - start < 5
    assert torch.equal(scores.collect(), torch.zeros(8))


@pytest.mark.parametrize("parallel", [0, 2])
def test_a_failing_scorer_stops_the_run_and_leaves_the_queue_empty(toy, parallel):
    words = ["high"]

    def no_numbers(images, prompts):
        return words * len(images) if words else [1.0] * len(images)

    scores, _ = queue(toy, no_numbers, parallel)
    with pytest.raises(BadInput) as caught:
        for number in range(3):
            scores.submit(two(number), PROMPTS)
        scores.collect()
    assert caught.value.field == "reward.name"
    words.clear()
    scores.submit(two(), PROMPTS)
    assert scores.collect().tolist() == [1.0, 1.0]


def test_figures_of_rewards_are_means_over_tails_and_spreads_of_siblings():
    """V = 2, M = 2, S = 2, R = 2, K = 2; forks of each trunk lie elsewhere, some rewards are missing."""
    panel = Panel({"a": scorer(None), "b": scorer(None)}, torch.tensor([1.0, 0.5]))
    rewards = torch.zeros(2, 2, 2, 2, 2)
    rewards[:, 0, 0, 0] = torch.tensor([[0.0, 2.0], [0.0, 4.0]])  # fork 0 of trunk 0: spreads 1 and 2
    rewards[:, 1, 1, 1] = torch.tensor([[0.0, 8.0], [0.0, 8.0]])  # fork 1 of trunk 1: .5 * 4
    rewards[0, 0, 1, 0, 0] = torch.nan
    steps = torch.tensor([[0, 1], [3, 3]])
    credit = give_credit(rewards, panel.weights, SimpleNamespace(noises=1, group="seed", std="group", clip=5.0,
                                                                 combine="sum"))  # fmt: skip
    figures = reward_figures(rewards, credit, panel, steps, 5)
    assert figures["reward_means"] == pytest.approx({"a": 6 / 15, "b": 1.0})
    assert figures["reward_mean"] == pytest.approx((6 + 8) / 15)
    assert figures["rewards_missing"] == 1 and figures["groups_masked"] == 2
    # step 3: fork 1 of trunk 0 once (one tail has one known sibling only), of trunk 1 twice
    assert figures["reward_std_per_step"] == [1.5, 0.0, None, pytest.approx(4 / 3, abs=1e-5)]
