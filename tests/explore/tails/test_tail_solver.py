"""Tables of tail steps against formulas written out, fields with known solutions, and orders of convergence."""

import math
from itertools import pairwise

import pytest
import torch

from tempflow.explore.schedule import build_schedule
from tempflow.explore.tails.solver import COLUMNS, EXACT, IDLE, KEEP_V, KEEP_X, MEMORY, SIGMA, TailSolver, tail_solvers
from tempflow.settings.fields import TailConfig

SOLVERS = ("euler", "dpmpp_2m", "adams_2")


def even_schedule(steps):
    return build_schedule(torch.linspace(1, 0, steps + 1, dtype=torch.float64), "flow_sde", 0.7)


def walk(rows, x, velocity):
    """Follows table rows in float64."""
    memory = torch.zeros_like(x)
    for row in rows.tolist():
        v = velocity(x, row[SIGMA])
        following = row[0] * x + row[1] * v + row[MEMORY] * memory
        memory = row[KEEP_X] * x + row[KEEP_V] * v
        x = following
    return x


def tail(solver, schedule, first_step):
    table = solver.table(schedule)
    return table.steps[first_step, len(table.steps[0]) - table.lengths[first_step] :]


def test_the_default_is_the_trunks_own_step(schedule):
    table = EXACT.table(schedule)
    assert table.lengths == tuple(range(10, 0, -1)) and not table.remembers
    for first in range(10):
        rows = tail(EXACT, schedule, first)
        assert torch.equal(rows[:, 0], schedule.ode.x_coef[first:])
        assert torch.equal(rows[:, 1], schedule.ode.v_coef[first:])
        assert torch.equal(rows[:, SIGMA], schedule.sigmas[first:-1]) and not rows[:, 2].any()
        assert table.steps[first, :first].tolist() == [list(IDLE)] * first
    assert COLUMNS[:4] == ("x_coef", "v_coef", "std", "sigma")


def test_stride_and_dropped_steps(schedule):
    sigmas = schedule.sigmas.tolist()
    assert TailSolver(stride=2).visited(schedule, 3) == [sigmas[step] for step in (3, 5, 7, 9)] + [0]
    assert TailSolver(stride=2).visited(schedule, 4) == [sigmas[step] for step in (4, 6, 8)] + [0]
    assert TailSolver(drop_below=0.01).visited(schedule, 6) == [sigmas[step] for step in (6, 7, 8)] + [0]
    assert TailSolver(drop_below=0.5).visited(schedule, 8) == [sigmas[8], 0]  # a tail takes its first step
    assert TailSolver(drop_below=0.01).visited(schedule, 9) == [sigmas[9], 0]
    exactly = TailSolver(drop_below=sigmas[7])  # a sigma at the limit is not below it
    assert exactly.visited(schedule, 6) == [sigmas[step] for step in (6, 7)] + [0]
    for solver in (TailSolver(stride=3), TailSolver(stride=2, drop_below=0.3), TailSolver("adams_2", 2, 0.6)):
        lengths = solver.table(schedule).lengths
        assert list(lengths) == sorted(lengths, reverse=True) and min(lengths) == 1


def test_tails_of_a_chunk_end_together(schedule):
    table = TailSolver(stride=2).table(schedule)  # lengths 5 5 4 4 3 3 2 2 1 1
    stages = table.stages([3, 3, 6, 9], torch.device("cpu"))
    assert stages.shape == (4, 4, 8) and stages.dtype == torch.float32
    assert table.under_way([3, 3, 6, 9]) == [2, 2, 3, 4]
    sigmas = schedule.sigmas.float()
    assert torch.equal(stages[:, 0, SIGMA], sigmas[[3, 5, 7, 9]])
    assert torch.equal(stages[2:, 2, SIGMA], sigmas[[6, 8]]) and stages[:2, 2].tolist() == [list(IDLE)] * 2
    assert stages[-1, 3, :2].tolist() == [1, -sigmas[9].item()]


def test_a_list_of_strides_is_several_solvers():
    one, several = TailConfig(solver="adams_2", stride=2, drop_below=0.1), TailConfig(stride=[1, 2, 4])
    assert tail_solvers(one) == (TailSolver("adams_2", 2, 0.1),)
    assert tail_solvers(several) == (EXACT, TailSolver(stride=2), TailSolver(stride=4))


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(("stride", "drop_below"), [(1, 0.0), (2, 0.0), (1, 0.3), (3, 0.1)])
def test_every_solver_finds_a_single_image_exactly(schedule, name, stride, drop_below):
    """All data in one point: v = (x - point) / sigma, and every tail ends in that point."""
    point = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for first in range(10):
        rows = tail(TailSolver(name, stride, drop_below), schedule, first)
        found = walk(rows, point + torch.ones(5), lambda x, sigma: (x - point) / sigma)
        assert (found - point).abs().max() < 1e-12


def test_dpmpp_equals_the_published_recursion(schedule):
    """DPM-Solver++(2M) in its own terms: data predictions, lambda, exp(-h), with alpha = 1 - sigma."""

    def velocity(x, sigma):
        return torch.sin(3 * x) + sigma * x

    def lam(sigma):
        return math.log(1 - sigma) - math.log(sigma)

    x = torch.randn(7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = walk(tail(TailSolver("dpmpp_2m"), schedule, 2), x, velocity)
    sigmas, previous = schedule.sigmas.tolist()[2:], None
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        image = x - sigma * velocity(x, sigma)
        used = image
        if previous is not None and following > 0:
            h, h_before = lam(following) - lam(sigma), lam(sigma) - lam(sigmas[i - 1])
            r = h_before / h
            used = (1 + 1 / (2 * r)) * image - 1 / (2 * r) * previous
        decay = following / sigma if following == 0 else math.exp(lam(sigma) - lam(following))
        alpha = 1 - following
        x = following / sigma * x - alpha * (decay - 1) * used
        previous = image
    assert (found - x).abs().max() < 1e-12


def test_adams_is_exact_where_velocity_is_linear_in_sigma():
    """But for its first step, which is Euler's: an error of slope D^2 / 2, on a tail of any stride."""
    slope, schedule = 1.7, build_schedule([0.9, 0.8, 0.55, 0.3, 0.2, 0.0], "flow_sde", 0.7)
    rows = tail(TailSolver("adams_2"), schedule, 0)
    found = walk(rows, torch.zeros(1).double(), lambda x, s: 0.4 + slope * s + 0 * x)
    exact = -(0.4 * 0.9 + slope * 0.9**2 / 2)
    assert found.item() - exact == pytest.approx(-slope * 0.1**2 / 2, abs=1e-12)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("dpmpp_2m", 2), ("adams_2", 2)])
def test_order_of_convergence_on_gaussian_data(name, order):
    """Data N(mean, spread^2): x follows mean (1 - s) + sqrt((1 - s)^2 spread^2 + s^2) z, z fixed. From .9 to .2: on the
    last of evenly spaced steps log((1 - s) / s) grows without bound, and there dpmpp_2m is of first order."""
    mean, spread, z = 0.8, 0.2, torch.tensor([-1.3, 0.4, 2.0], dtype=torch.float64)

    def velocity(x, s):
        variance = (1 - s) ** 2 * spread**2 + s**2
        return -mean + (x - mean * (1 - s)) * (s - (1 - s) * spread**2) / variance

    def state(s):
        return mean * (1 - s) + math.sqrt((1 - s) ** 2 * spread**2 + s**2) * z

    errors = []
    for steps in (40, 80, 160):
        schedule, first = even_schedule(steps), steps // 10
        rows = tail(TailSolver(name), schedule, first)[: steps * 7 // 10]
        errors.append((walk(rows, state(0.9), velocity) - state(0.2)).abs().max().item())
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)
