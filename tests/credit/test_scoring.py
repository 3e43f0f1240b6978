"""Branches meet their own prompt, in order, whether scored in turn or beside the sampler."""

import threading
import time

import pytest
import torch

from tempflow.common.clock import PhaseClock
from tempflow.common.errors import BadInput
from tempflow.credit.scoring import ScoreQueue
from tempflow.prompts import Prompt
from tempflow.rewards.scorer import Scorer


def queue(toy, function, parallel, rows=2):
    scorer = Scorer("reward.name", "mine", function, rows, parallel)
    clock = PhaseClock(toy.device)
    return ScoreQueue(toy, scorer, rows, clock, overlap=True), clock


def number_of_prompt(images, prompts):
    """What the picture shows plus a tenth of what the prompt says, so that either being out of place is seen."""
    return [image[0, 0, 0].item() + float(prompt.text) / 10 for image, prompt in zip(images, prompts, strict=True)]


@pytest.mark.parametrize("parallel", [0, 1, 4])
def test_rewards_come_in_the_order_of_the_branches(toy, parallel):
    scores, clock = queue(toy, number_of_prompt, parallel)
    torch.manual_seed(3)
    for _ in range(2):  # a queue serves many iterations
        latents, prompts = torch.randn(11, 2, 3), [Prompt(str(number)) for number in range(11)]
        for part in (slice(0, 5), slice(5, 10), slice(10, 11)):
            scores.submit(latents[part], prompts[part])
        expected = toy.decode(latents)[:, 0, 0, 0] + torch.arange(11) / 10
        assert torch.allclose(scores.collect(), expected)
    assert set(clock.read()) == {"decode", "reward"}


def test_scoring_elsewhere_goes_on_beside_the_sampler(toy):
    """Four chunks wait for another machine at once, while this thread goes on."""
    together = threading.Barrier(4, timeout=10)

    def elsewhere(images, prompts):
        together.wait()  # returns only when four calls are in flight
        return torch.zeros(len(images))

    scores, _ = queue(toy, elsewhere, parallel=4)
    start = time.perf_counter()
    for _ in range(4):
        scores.submit(torch.zeros(2, 2, 3), [Prompt("a"), Prompt("b")])
    assert time.perf_counter() - start < 5
    assert torch.equal(scores.collect(), torch.zeros(8))


@pytest.mark.parametrize("parallel", [0, 2])
def test_a_failing_scorer_stops_the_run(toy, parallel):
    def no_numbers(images, prompts):
        return ["high"] * len(images)

    scores, _ = queue(toy, no_numbers, parallel)
    with pytest.raises(BadInput, match="refuses"):
        for _ in range(3):
            scores.submit(torch.zeros(2, 2, 3), [Prompt("a"), Prompt("b")])
        scores.collect()
