"""Checks run once per signature and find every mistake; calls go past the dispatcher where nobody watches."""

import subprocess
import sys
from pathlib import Path

import pytest
import tempflow_kernels as tk
import torch
from kernel_cases import Case
from tempflow_kernels import ops as public
from tempflow_kernels.checks import Checked
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

CASE = Case(optional=())
HOST_COST = Path(__file__).resolve().parents[2] / "benchmarks" / "operators" / "host_cost.py"


def loss(velocity=CASE.velocity, clip=(1e-4, 1e-4), **changes):
    given = {"velocity_old": CASE.velocity_old, "advantages": CASE.advantages, "terms": CASE.terms, "key": CASE.key}
    return tk.branch_loss(velocity, **(given | changes), clip_range=clip)


def step(siblings=1, **changes):
    given = {"latents": CASE.latents, "velocity": CASE.velocity, "coef": CASE.coef, "key": CASE.key}
    return tk.transition_step(**(given | changes), siblings=siblings)


def test_a_signature_is_checked_once(monkeypatch):
    counted, route = [], public._step_route
    watched = Checked(lambda *arguments: (counted.append(1), route.function(*arguments))[1])
    monkeypatch.setattr(public, "_step_route", watched)
    for siblings in (1, 1, 2, 1, 2):
        step(siblings)
    assert len(counted) == 2
    for number in range(Checked.LIMIT + 1):
        watched._first((number,), (CASE.latents, CASE.velocity, CASE.coef, CASE.key, 1, None, 1.0))
    assert len(watched.answers) <= Checked.LIMIT


@pytest.mark.parametrize("changes", [
    {"siblings": True}, {"siblings": 1.0}, {"velocity": CASE.velocity[:, :2]}, {"velocity": CASE.velocity.long()},
    {"key": CASE.key.int()}, {"velocity": CASE.velocity.to("meta")}, {"velocity": CASE.velocity[:3]},
    {"coef": CASE.coef * torch.tensor([1.0, 1.0, -1.0])}, {"coef": CASE.coef.half()},
])  # fmt: skip
def test_a_right_call_hides_no_wrong_one(changes):
    for _ in range(2):
        step(1)
        with pytest.raises(ValueError, match=next(iter(changes))):
            step(**changes)


def test_a_coefficient_that_turns_negative_in_place_is_found():
    coef = CASE.coef.clone()
    step(coef=coef)
    coef[2, 2] = -0.1
    with pytest.raises(ValueError, match="coef"):
        step(coef=coef)


def test_gradients_follow_grad_mode_and_precision_of_each_call():
    leaf, double = CASE.velocity.clone().requires_grad_(), CASE.velocity.double()
    public._loss_route.answers.clear()
    loss()
    for _ in range(2):
        assert loss(leaf)[0].requires_grad and not loss()[0].requires_grad
        with torch.no_grad():
            assert not loss(leaf)[0].requires_grad
        assert loss(double)[0].dtype == torch.float64 and loss()[0].dtype == torch.float32
        assert loss(advantages=CASE.advantages.clone().requires_grad_())[0].requires_grad


def test_modes_fakes_and_profilers_see_the_operators():
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            seen.append(str(operator))
            return operator(*args, **(kwargs or {}))

    seen, leaf = [], CASE.velocity.clone().requires_grad_()
    loss(leaf)
    with Watch():
        step()
        loss(leaf)[0].backward()
    assert any("transition_step" in name for name in seen) and any("branch_loss" in name for name in seen)
    with FakeTensorMode() as mode:
        names = ("latents", "velocity", "coef", "key")
        latents, velocity, coef, key = (mode.from_tensor(getattr(CASE, name)) for name in names)
        assert tk.transition_step(latents, velocity, coef, key)[0].shape == (4, 1, 3, 7, 11)
    with torch.autograd.profiler.profile() as profile:
        step()
    assert any("transition_step" in event.name for event in profile.function_events)


def test_past_the_dispatcher_the_numbers_are_the_same():
    leaves = [CASE.velocity.clone().requires_grad_() for _ in range(2)]
    direct = (*step(3), *loss(leaves[0]))
    direct[2].backward()
    with torch.autograd.profiler.profile():
        dispatched = (*step(3), *loss(leaves[1]))
        dispatched[2].backward()
    assert all(torch.equal(a, b) for a, b in zip(direct[:3], dispatched[:3], strict=True))
    assert torch.equal(direct[3].table, dispatched[3].table) and torch.equal(leaves[0].grad, leaves[1].grad)


def test_the_statistics_are_named_iterated_and_indexed_in_one_order():
    _, stats = loss()
    named = [getattr(stats, name) for name in stats._fields]
    assert len(stats) == 7 and torch.equal(torch.stack(named), stats.table)
    assert torch.equal(torch.stack(list(stats)), stats.table) and torch.equal(stats[2], stats.clip_fraction)


def test_host_cost_is_measured_without_a_gpu():
    pytest.importorskip("triton")
    run = subprocess.run([sys.executable, HOST_COST, "--rounds", "1", "--count", "5"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert {"step", "log_ratio", "loss and backward"} <= {line[:18].strip() for line in run.stdout.splitlines()}
