"""Guidance in part of the tails: rows, engines, chunks, cost and refusal; the merged copy without autocast."""

import pytest
import tiny_pipelines
import torch
from conftest import ToyPolicy
from rollout_cases import at_their_places, explored, forked
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tempflow.common.errors import BadInput
from tempflow.explore.schedule import build_schedule
from tempflow.explore.tails.choose import check_tail_settings
from tempflow.explore.tails.chunks import Probe, choose_rows
from tempflow.explore.tails.engine import EagerEngine
from tempflow.explore.tails.recorded import BufferStore, StaticEngine
from tempflow.explore.tails.solver import EXACT, TailSolver, tail_solvers
from tempflow.forecast.cost import Shape, iteration_cost
from tempflow.settings.fields import TailConfig

SOLVERS = [TailSolver(guidance_above=0.5), TailSolver("adams_2", stride=2, guidance_above=0.75)]
IDS = [solver.describe() for solver in SOLVERS]


class GuidedToy(ToyPolicy):
    """With an unconditional half, whose rows cost as much; counts network rows."""

    def __init__(self):
        super().__init__()
        self.network_rows, self.spent = 2, 0

    def velocity(self, latents, sigma, conditioning, guided=True):
        self.spent += len(latents) * (1 if guided is False else 2)
        cond = super().velocity(latents, sigma, conditioning)
        if guided is False:
            return cond
        both = cond + 0.7 * torch.sin(latents)
        return both if guided is True else torch.where(guided.view(-1, 1, 1), both, cond)


@pytest.fixture
def toy():
    return GuidedToy()


@torch.no_grad()
def by_hand(policy, latents, firsts, conditioning, schedule, solver):
    """One branch after the other, guidance switched by the sigma of the step."""
    for row, first in enumerate(firsts):
        x, kept = latents[row : row + 1].clone(), torch.zeros_like(latents[:1])
        table = solver.table(schedule)
        for x_coef, v_coef, _, sigma, memory, keep_x, keep_v, _ in table.steps[first][-table.lengths[first] :].tolist():
            here, guided = conditioning.rows(slice(row, row + 1)), sigma >= solver.guidance_above
            v = policy.velocity(x, torch.tensor([sigma]), here, guided)
            x, kept = x_coef * x + v_coef * v + memory * kept, keep_x * x + keep_v * v
        latents[row] = x[0]


@pytest.mark.parametrize("solver", SOLVERS, ids=IDS)
def test_rows_take_the_guidance_of_their_own_sigma(toy, schedule, strict_recorder, solver):
    """However branches travel together: odd and even first steps are at different sigmas of a stage with stride 2."""
    _, plan, _ = forked(forks=[1, 4, 5, 8], siblings=2)
    rollout = explored(toy, schedule, plan, 3)
    expected = at_their_places([EagerEngine(toy, 1, solver)], rollout, schedule)
    for rows in (1, 5, 7, 100):
        static = StaticEngine(BufferStore(toy, rows, strict_recorder, torch.no_grad), solver)
        for engine in (EagerEngine(toy, rows, solver), static):
            assert torch.equal(at_their_places([engine], rollout, schedule), expected)
    assert strict_recorder.recorded == 8
    noise, firsts = torch.randn(3, 2, 3), [1, 4, 9]
    conditioning, found, hand = toy.encode(["one", "three", "eleven"]), noise.clone(), noise.clone()
    EagerEngine(toy, 3, solver).finish(found, firsts, conditioning, schedule)
    by_hand(toy, hand, firsts, conditioning, schedule, solver)
    assert (found - hand).abs().max() < 1e-5
    EagerEngine(toy, 3, TailSolver(solver.solver, solver.stride)).finish(hand, firsts, conditioning, schedule)
    assert (found - hand).abs().max() > 1e-2


def test_the_default_guides_everywhere_in_one_recording(toy, schedule, strict_recorder):
    (solver,) = tail_solvers(TailConfig())
    assert solver == EXACT and not solver.table(schedule).switches
    engine, seen = StaticEngine(BufferStore(toy, 2, strict_recorder, torch.no_grad), solver), []
    velocity = toy.velocity
    toy.velocity = lambda *arguments: seen.append(arguments[3]) or velocity(*arguments)
    engine.finish(torch.randn(2, 2, 3), [3, 3], toy.encode(["a", "b"]), schedule)
    EagerEngine(toy, 2).finish(torch.randn(2, 2, 3), [3, 5], toy.encode(["a", "b"]), schedule)
    assert strict_recorder.recorded == 1 and all(guided is True for guided in seen)


def test_stages_without_guidance_cost_half(toy, schedule):
    """Of the ten sigmas .4649, .278, .0089 lie below .5: by hand for tails from steps 1 and 8."""
    solver = SOLVERS[0]
    table = solver.table(schedule)
    assert TailSolver(guidance_above=schedule.sigmas[8].item()).table(schedule).unguided[1] == 1  # not below itself
    assert table.unguided[1] == 3 and table.unguided[8] == 2 and EXACT.table(schedule).unguided == (0,) * 10
    engine = EagerEngine(toy, 2, solver)
    engine.finish(torch.zeros(2, 2, 3), [1, 8], toy.encode(["a", "b"]), schedule)
    assert toy.spent == 6 * 2 + 1 + 2 * 2 and engine.work.computed == engine.work.needed == toy.spent / 2
    _, _, rule = forked(forks=[1, 8])
    cost = iteration_cost(rule, schedule, (solver,), Shape(2, 3, 6, 24))
    of_tails = sum(table.lengths[rule.after(step)] for step in (1, 8)) * 6
    assert (cost.tail_rows, cost.unguided_rows) == (of_tails, (3 + 1) * 6)
    plain = iteration_cost(rule, schedule, (EXACT,), Shape(2, 3, 6, 24))
    total, less = (int(c.describe(2).split(" in all")[0].split()[-1]) for c in (plain, cost))
    assert total - less == 24 and plain.describe(1) == plain.describe(1).replace("once", "")


def test_chunks_are_planned_with_these_prices():
    """Two calls a branch, in calls that cost in proportion beyond 10 rows: a half-price call of 16 is as long as 8."""
    probes = (Probe(8, 10.0, 0), Probe(16, 16.0, 0))
    whole, half = (choose_rows([2] * 16, probes, float("inf"), True, unguided) for unguided in (0, 2))
    assert whole.rows == 16 == half.rows and (whole.waste, half.waste) == (0, 0)
    steep = (Probe(4, 4.0, 0), Probe(8, 20.0, 0))
    assert [choose_rows([1] * 8, steep, float("inf"), True, unguided).rows for unguided in (0, 1)] != [8, 8]
    assert choose_rows([1] * 8, steep, float("inf"), True, 1).rows == 8 > choose_rows([1] * 8, steep, 9e9, True).rows


def test_models_without_classifier_free_guidance_refuse():
    with pytest.raises(BadInput) as caught:
        check_tail_settings(TailConfig(guidance_above=0.5), 1, torch.device("cpu"))
    assert caught.value.field == "tails.guidance_above"
    check_tail_settings(TailConfig(guidance_above=0.5), 2, torch.device("cpu"))


@pytest.mark.parametrize("name", ["sd3", "qwen_image", "flux2_klein", "z_image"])
def test_every_guided_family_switches(load_tiny, name):
    """Against its own formula with and without the unconditional half; no rows are spent below the limit."""
    policy = load_tiny(name, 3.0)
    solver = TailSolver(guidance_above=policy.sigmas(4)[2].item())
    steps = build_schedule(policy.sigmas(4), "flow_sde", 0.7)
    texts, noise = policy.encode(tiny_pipelines.TEXTS), torch.randn(3, *policy.latent_shape)
    found, expected, rows = noise.clone(), noise.clone(), []
    network = policy._network
    policy._network = lambda latents, *rest: rows.append(len(latents)) or network(latents, *rest)
    EagerEngine(policy, 3, solver).finish(found, [0, 0, 0], texts, steps)
    assert set(rows) == {3, 6}
    by_hand(policy, expected, [0, 0, 0], texts, steps, solver)
    assert (found - expected).abs().max() < 1e-4
    with torch.no_grad():
        sigma = torch.full((3,), 0.5)
        whole, bare = (policy.velocity(noise, sigma, texts, guided) for guided in (True, False))
        mixed = policy.velocity(noise, sigma, texts, torch.tensor([True, False, True]))
    assert torch.equal(mixed[::2], whole[::2]) and (mixed[1] - bare[1]).abs().max() < 1e-5
    assert (whole - bare).abs().max() > 1e-3


class NormsInFp32(TorchFunctionMode):
    """Autocast's other list on a GPU: what it computes and returns in fp32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.layer_norm, F.rms_norm, F.group_norm, F.softmax) and torch.is_autocast_enabled("cpu"):
            args = tuple(a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
            kwargs = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("name", list(tiny_pipelines.BUILDERS))
def test_a_merged_copy_in_bf16_needs_no_autocast(load_tiny, disturb, name, train):
    """Rounding only: within bf16's of what autocast gives with its norms in fp32, as on a GPU."""
    policy = load_tiny(name, 2.0, dtype="bf16", train=train)
    disturb(policy.trainable(), 0.05 if train == "lora" else 0.01)
    arguments = torch.randn(3, *policy.latent_shape), torch.tensor([0.9, 0.5, 0.1]), policy.encode(tiny_pipelines.TEXTS)
    modes = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda *_: modes.append(torch.is_autocast_enabled("cpu")))  # fmt: skip
    with policy.merged(), NormsInFp32():
        found = policy.velocity(*arguments)
        assert not any(modes)
        policy.network._merged.all_bf16 = False
        modes.clear()
        expected = policy.velocity(*arguments)
    assert (found - expected).square().mean().sqrt() < 2e-2 * expected.std()
    policy.velocity(*arguments)  # the trained network, from which evaluation and learning are
    hook.remove()
    assert all(modes)


@torch.no_grad()
def test_other_precisions_are_called_as_before(load_tiny):
    for dtype, autocast in (("fp16", True), ("fp32", False)):
        policy, modes = load_tiny("sd3", 2.0, dtype=dtype), []
        texts = policy.encode(["three fours"])
        hook = torch.nn.modules.module.register_module_forward_pre_hook(
            lambda *_, modes=modes: modes.append(torch.is_autocast_enabled("cpu")))  # fmt: skip
        with policy.merged():
            policy.velocity(torch.randn(1, *policy.latent_shape), torch.ones(1), texts)
        hook.remove()
        assert modes and all(mode == autocast for mode in modes)
