"""Tail engines: all levels give the images of plain calls; merged weights are fresh; waste is counted."""

from contextlib import nullcontext

import pytest
import tiny_pipelines
import torch
from rollout_cases import TEXTS, at_their_places, explored, forked
from torch import nn

from tempflow.explore.schedule import build_schedule
from tempflow.explore.tails.compiled import CompiledBlocks
from tempflow.explore.tails.engine import EagerEngine
from tempflow.explore.tails.recorded import BufferStore, Direct, StaticEngine
from tempflow.explore.tails.solver import EXACT, TailSolver

DIGITS = ("a two at the top left", "three fours")
SOLVERS = (EXACT, TailSolver("dpmpp_2m"), TailSolver("adams_2", stride=2), TailSolver(drop_below=0.3))
IDS = [solver.describe() for solver in SOLVERS]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(5)


def branches_of(policy, texts=TEXTS, **explore):
    """The branches of some forks, which are to be finished."""
    schedule, plan, _ = forked(**explore)
    return explored(policy, schedule, plan, 3, texts)


def images(engine, rollout, schedule):
    return at_their_places([engine], rollout, schedule)


def static(policy, rows, recorder, solver=EXACT, numerics=nullcontext):
    return StaticEngine(BufferStore(policy, rows, recorder, numerics), solver)


@pytest.mark.parametrize("solver", SOLVERS, ids=IDS)
@pytest.mark.parametrize("rows", [1, 7, 24, 54, 100])
def test_recorded_calls_equal_plain_ones(toy, schedule, strict_recorder, solver, rows):
    """Chunks that straddle forks, short last chunks, chunks larger than everything: to the last bit."""
    rollout = branches_of(toy, forks=[0, 3, 8], siblings=4)
    expected = images(EagerEngine(toy, 5, solver), rollout, schedule)
    toy.calls.clear()
    found = images(static(toy, rows, strict_recorder, solver), rollout, schedule)
    assert torch.equal(found, expected)
    assert set(toy.calls) == {rows} and strict_recorder.recorded == 1
    assert len(toy.calls) == strict_recorder.replayed + 2


@torch.no_grad()
@pytest.mark.parametrize("solver", SOLVERS, ids=IDS)
def test_engines_follow_their_tables(toy, schedule, strict_recorder, solver):
    """Against the rows of the table taken one by one, for each branch alone."""
    firsts, noise, conditioning = [1, 4, 4, 9], torch.randn(4, 2, 3), toy.encode([*TEXTS, "twenty"])
    found, table = noise.clone(), solver.table(schedule)
    static(toy, 6, strict_recorder, solver).finish(found, firsts, conditioning, schedule)
    for row, first in enumerate(firsts):
        x, kept = noise[row : row + 1], torch.zeros(1, 2, 3)
        for x_coef, v_coef, _, sigma, memory, keep_x, keep_v, _ in table.steps[first][-table.lengths[first] :].tolist():
            v = toy.velocity(x, torch.tensor([sigma]), conditioning.rows(slice(row, row + 1)))
            x, kept = x_coef * x + v_coef * v + memory * kept, keep_x * x + keep_v * v
        assert (found[row] - x[0]).abs().max() < 1e-5


def test_one_recording_serves_training_and_evaluation(toy, schedule, strict_recorder):
    """Other schedules, other solvers without memory, other first steps: nothing is recorded again."""
    store = BufferStore(toy, 6, strict_recorder, nullcontext)
    conditioning = toy.encode(TEXTS)
    for solver, first in ((EXACT, 0), (TailSolver(stride=2), 4), (TailSolver(drop_below=0.5), 9)):
        for steps in (schedule, _schedule_of(toy, 25)):
            latents = torch.randn(3, 2, 3)
            expected = latents.clone()
            StaticEngine(store, solver).finish(latents, [first] * 3, conditioning, steps)
            EagerEngine(toy, 6, solver).finish(expected, [first] * 3, conditioning, steps)
            assert torch.equal(latents, expected)
    assert strict_recorder.recorded == 1


def test_a_store_serves_solvers_with_and_without_memory(toy, schedule, strict_recorder):
    """Euler first, whose buffers keep nothing; a solver of second order after it has its memory all the same."""
    store, conditioning = BufferStore(toy, 6, strict_recorder, nullcontext), toy.encode(TEXTS)
    for solver in (EXACT, TailSolver("dpmpp_2m"), TailSolver("adams_2"), EXACT):
        latents = torch.randn(3, 2, 3)
        expected, plain = latents.clone(), latents.clone()
        StaticEngine(store, solver).finish(latents, [2, 2, 5], conditioning, schedule)
        EagerEngine(toy, 6, solver).finish(expected, [2, 2, 5], conditioning, schedule)
        EagerEngine(toy, 6).finish(plain, [2, 2, 5], conditioning, schedule)
        assert torch.equal(latents, expected) and torch.equal(latents, plain) == (solver == EXACT)
    assert strict_recorder.recorded == 2


def _schedule_of(policy, steps):
    return build_schedule(policy.sigmas(steps), "flow_sde", 0.7)


def test_waste_counts_padding_and_waiting(toy, schedule, strict_recorder):
    engine = static(toy, 6, strict_recorder)
    conditioning = toy.encode(TEXTS + TEXTS[:1])
    engine.finish(torch.randn(4, 2, 3), [6, 6, 8, 8], conditioning, schedule)
    assert (engine.work.computed, engine.work.needed) == (6 * 4, 2 * 4 + 2 * 2)
    assert engine.work.read() == 0.5 and engine.work.read() == 0.0
    eager = EagerEngine(toy, 6)
    eager.finish(torch.randn(4, 2, 3), [6, 6, 8, 8], conditioning, schedule)
    assert eager.work.computed == 12 and eager.work.read() == 0.0


def test_other_rows_of_the_buffers_do_not_matter(toy, schedule, strict_recorder):
    """What an earlier chunk left in rows that a short chunk does not fill changes nothing, even if it is not finite."""
    engine = static(toy, 5, strict_recorder, TailSolver("adams_2"))
    engine.finish(torch.full((5, 2, 3), float("inf")), [2] * 5, toy.encode(["a" * 99] * 5), schedule)
    short = torch.randn(2, 2, 3)
    alone = short.clone()
    engine.finish(short, [2, 2], toy.encode(TEXTS[:2]), schedule)
    static(toy, 2, strict_recorder, TailSolver("adams_2")).finish(alone, [2, 2], toy.encode(TEXTS[:2]), schedule)
    assert torch.equal(short, alone)


def test_the_recorder_of_these_tests_notices_what_a_graph_would_miss(strict_recorder):
    data = {"tensor": torch.zeros(3), "number": 1.0}
    replay = strict_recorder.record(lambda: data["tensor"].mul_(2).add_(data["number"]))
    replay()
    data["tensor"] += 1  # other values in the same place: a graph follows
    replay()
    data["number"] = 2.0
    with pytest.raises(AssertionError, match="captured graph"):
        replay()
    data |= {"number": 1.0, "tensor": torch.zeros(3)}
    with pytest.raises(AssertionError, match="captured graph"):
        replay()


def test_levels_agree_on_the_sd3_pipeline(digits_policy, schedule, strict_recorder):
    """Plain, merged and recorded calls: rounding only. The stated error of every level in fp32."""
    rollout = branches_of(digits_policy, DIGITS, forks=[1, 6], siblings=2)
    expected = images(EagerEngine(digits_policy, 8), rollout, schedule)
    merged = EagerEngine(digits_policy, 8, EXACT, digits_policy.merged)
    recorded = static(digits_policy, 6, strict_recorder, EXACT, digits_policy.merged)
    for engine in (merged, recorded):
        assert (images(engine, rollout, schedule) - expected).abs().max() < 2e-4
    assert expected.std() > 0.3


@pytest.mark.parametrize("name", ["sd3", "flux", "flux2", "flux2_klein", "z_image"])
def test_every_family_but_one_can_be_captured(load_tiny, strict_recorder, name):
    """Guided where it can be, merged, padded. (Qwen-Image makes a tensor of a number in every call.)"""
    policy = load_tiny(name, 2.0)
    steps = _schedule_of(policy, 4)
    noise, conditioning = torch.randn(3, *policy.latent_shape), policy.encode(tiny_pipelines.TEXTS)
    found, expected = noise.clone(), noise.clone()
    static(policy, 4, strict_recorder, EXACT, policy.merged).finish(found, [1, 1, 2], conditioning, steps)
    EagerEngine(policy, 4).finish(expected, [1, 1, 2], conditioning, steps)
    assert (found - expected).abs().max() < 1e-4 < (found - noise).abs().max()
    assert strict_recorder.replayed == 3 and policy.blocks()


def test_merged_weights_follow_training_only_when_refreshed(digits_policy, schedule, strict_recorder, disturb):
    """In place, so that a recorded call sees them."""
    engine = static(digits_policy, 4, strict_recorder, EXACT, digits_policy.merged)
    conditioning, noise = digits_policy.encode(DIGITS), torch.randn(2, 4, 8, 8)

    def finished(by):
        latents = noise.clone()
        by.finish(latents, [5, 5], conditioning, schedule)
        return latents

    before = finished(engine)
    disturb(digits_policy.trainable(), 0.05)
    assert torch.equal(finished(engine), before)
    digits_policy.refresh_merged()
    after = finished(engine)
    assert (after - finished(EagerEngine(digits_policy, 4))).abs().max() < 2e-4 < (after - before).abs().max()
    assert strict_recorder.recorded == 1


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.nn.functional.gelu(self.linear(x)) * torch.sigmoid(x)


def test_compiled_blocks_share_one_artefact_and_leave_nothing_behind(schedule):
    torch.manual_seed(0)
    blocks = nn.Sequential(Block(), Block(), Block()).requires_grad_(False)
    x = torch.randn(5, 8)
    expected = blocks(x)
    torch._dynamo.utils.counters.clear()
    compiled = CompiledBlocks(list(blocks))
    with compiled():
        inside = blocks(x)
        for block in blocks:
            block.linear.weight.mul_(2)  # in place: compiled code reads the parameters
        changed = blocks(x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert (inside - expected).abs().max() < 1e-5 < (changed - expected).abs().max()
    calls = torch._dynamo.utils.counters["frames"]["ok"]
    assert torch.equal(blocks(x), nn.Sequential(*blocks)(x)) and not any("forward" in vars(block) for block in blocks)
    assert torch._dynamo.utils.counters["frames"]["ok"] == calls


def test_compiled_tails_equal_plain_ones(toy, schedule):
    """A network with repeated blocks, through the engine, with a short last chunk."""
    torch.manual_seed(1)
    blocks = nn.Sequential(Block(), Block()).requires_grad_(False)
    plain = toy.velocity
    toy.velocity = lambda latents, sigma, conditioning, guided=True: plain(
        latents + blocks(torch.cat((latents.flatten(1), latents.flatten(1)[:, :2]), 1))[:, :6].view_as(latents),
        sigma,
        conditioning,
    )
    rollout = branches_of(toy, forks=[2, 7], siblings=3)
    expected = images(EagerEngine(toy, 9), rollout, schedule)
    found = images(static(toy, 16, Direct(), EXACT, CompiledBlocks(list(blocks))), rollout, schedule)
    assert (found - expected).abs().max() < 1e-5 and not torch.equal(found, torch.zeros_like(found))
