"""The plan's numbers: forks that are drawn, groups, processes."""

import pytest

from tempflow.explore.tails.solver import TailSolver
from tempflow.forecast.cost import Shape, iteration_cost
from tempflow.forecast.words import Forecast
from tempflow.method import read_method
from tempflow.models.load import load_skeleton
from tempflow.settings.reading import load

SETTINGS = ["explore.prompts=4", "explore.noises=2", "explore.siblings=3", "sample.steps=5", "learn.rows=2",
            "learn.iterations=10"]  # fmt: skip


def forecast(*overrides: str, ranks: int = 1) -> Forecast:
    config = load(["digits", *SETTINGS, *overrides])
    skeleton = load_skeleton(config.model, config.sample)
    return Forecast(config, skeleton, *read_method(config, skeleton.sigmas(config.sample.steps)), ranks)


def test_two_processes_share_the_cost_and_not_the_run():
    """8 trunks, forks at 0 and 3: 4 trunks to step 3 on each process, tails of 4 and 1 steps."""
    words = forecast("explore.forks=[0,3]", "credit.group=prompt", "objective.kl=0.1", ranks=2).describe("cpu")
    for part in (
        "2 x cpu", "4 prompts x 2 noises = 8 trunks; each forks at 2 steps into 3 siblings = 48 branches, one image",
        "advantages among 6 branches (credit.group=prompt: one prompt, one fork, all its noises), 8 groups",
        "each takes 16 network rows, with the 48 branches that left them (4 calls of 2 rows per process)",
        "the run: 10 iterations, 10 optimizer steps, 480 images",
        "forks at steps [0, 3]; weights", "cost per process: 4 trunks x 2 forks x 3 siblings, 24 images",
        "trunk 16, tails 60, learning 16, 92 in all",
    ):  # fmt: skip
        assert part in words, part


def test_updates_epochs_and_forks_multiply_optimizer_steps():
    words = forecast("explore.forks=[0,1,2]", "learn.updates=2", "learn.updates_by=forks", "learn.inner_epochs=2",
                     "credit.group=batch").describe("cpu")  # fmt: skip
    assert "learning: 12 optimizer steps an iteration, in 2 passes over them; each takes 4 network rows" in words
    assert "with the 12 branches that left them (2 calls of 2 rows" in words
    assert "advantages among 24 branches" in words and "120 optimizer steps, 720 images" in words


@pytest.mark.parametrize(("forks", "words"), [
    (["explore.forks=random:2"], "forks at steps [0, 1, 2, 3] (2 of them drawn each iteration)"),
    (["explore.take=1", "explore.draw=slide", "explore.every=7"], "(one after the other, each for 7 iterations)"),
    (["explore.forks=[0,1]", "explore.jump=[1,2]"], "merged steps (step: sigmas spanned): {1: 2}"),
    (["explore.forks=[0]", "explore.window=rest", "objective.weighting=uniform"],
     "weights of trained steps (objective.weighting=uniform): 0: 1.00, 1: 1.00, 2: 1.00, 3: 1.00"),
])  # fmt: skip
def test_how_forks_are_chosen(forks, words):
    assert words in forecast(*forks).describe("cpu")


def test_drawn_forks_are_costed_where_they_lie_as_early_as_they_may():
    """random:2 of T = 5: the trunk may go to step 3, and tails may set out at 1 and 2; 100 numbers, 7 bytes."""
    planned = forecast("explore.forks=random:2")
    cost = iteration_cost(planned.method.rule, planned.schedule, (TailSolver(),), Shape(8, 3, 100, 7))
    assert (cost.trunk_rows, cost.tail_rows, cost.learn_rows, cost.images) == (8 * 4, 24 * (4 + 3), 16, 48)
    assert (cost.state_bytes, cost.branch_bytes, cost.image_bytes) == (16 * 800, 48 * 800, 48 * 7)
