"""The benchmarks measure the same thing on both sides, report every figure, and end in time with the right status."""

import shutil
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
from machine.environment import environment, peak_bytes
from operators import report as kernel_report
from operators.callables import (
    OPERATORS,
    POINTS,
    SIGMAS,
    Inputs,
    Setting,
    bytes_moved,
    callables,
    eager,
    fused,
    kernels_alone,
)

SETTING = Setting("tiny", 2, 3)
DIFFERENTIABLE = [name for name, modes in OPERATORS.items() if "backward" in modes]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_operator_and_the_sequence_it_replaces_agree(name):
    """Values, and gradients summed over the siblings, which share one velocity in the operator only."""
    inputs = Inputs(SETTING)
    (ours, leaf), (theirs, branch_leaf) = fused(inputs)[name], eager(inputs)[name]
    found, expected = ours(leaf), theirs(branch_leaf)
    torch.testing.assert_close(found.flatten(), expected.flatten(), rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(found.mean(), leaf)
    (per_branch,) = torch.autograd.grad(expected.mean(), branch_leaf)
    per_row = per_branch.view(leaf.shape[0], -1, *leaf.shape[1:]).sum(1)
    torch.testing.assert_close(gradient, per_row, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", [name for name in OPERATORS if name not in DIFFERENTIABLE])
def test_draws_have_the_same_size_and_spread(name):
    inputs = Inputs(Setting("sd35_512", 1, 2))
    (ours, _), (theirs, _) = fused(inputs)[name], eager(inputs)[name]
    found, expected = (r[0] if isinstance(r, tuple) else r for r in (ours(), theirs()))
    assert found.numel() == expected.numel() and float(found.detach().std()) == pytest.approx(
        float(expected.detach().std()), rel=0.02
    )


def test_every_operator_has_every_mode_bytes_and_a_public_name():
    import tempflow_kernels as tk

    inputs = Inputs(SETTING)
    for provider in ("fused", "eager"):
        assert list(callables(inputs, provider)) == POINTS
    assert all(bytes_moved(*point, SETTING) > 0 for point in POINTS)
    reading = kernels_alone(inputs, "stored")
    assert list(reading) == [("loss", mode) for mode in OPERATORS["loss"]] == list(callables(inputs, "fused", "stored"))
    for call in (*kernels_alone(inputs).values(), *reading.values()):
        call()
    measured = {"normal_like", "transition_step", "transition_log_prob", "log_ratio", "branch_loss"}
    others = {"BranchLossStats", "backend_info", "fold_key", "gaussian_terms", "noise_mode", "philox4x32", "use_noise"}
    assert set(tk.__all__) == measured | others, "a new operator needs its rows"
    assert SIGMAS[0] == 1 and SIGMAS[-1] == 0


def test_peak_memory_of_a_call_on_the_cpu():
    size = 2**24
    peak = peak_bytes(lambda: torch.ones(size // 4), "cpu")
    if peak is None:
        pytest.skip("this system does not tell a process its peak")
    assert size <= peak < size + 2**20


def rows():
    size = {"shape": "tiny", "rows": 2, "siblings": 3, "dtype": "torch.float32", "bytes": 2**20, "peak_bytes": 2**20}
    common = {"device": "some", "torch": "2", "date": "today"}
    bounds = [
        {"operator": "copy", "provider": "bound", "bytes": 2**30, "median_ms": 1.0},
        {"operator": "launch", "provider": "bound", "bytes": 8, "median_ms": 0.5},
    ]
    times = {"fused": 2.0, "eager": 6.0, "compiled": 1.0}
    points = [
        {"operator": "loss", "mode": mode, "provider": provider, **size, "median_ms": 9.0, "min_ms": milliseconds}
        for mode in ("forward", "full") for provider, milliseconds in times.items()
    ]  # fmt: skip
    return [row | common for row in bounds + points]


def test_report_of_rows(tmp_path):
    pytest.importorskip("matplotlib")
    kernel_report.write(rows(), tmp_path)
    text = kernel_report.report(kernel_report.read(tmp_path), tmp_path)
    assert "| loss | full | tiny R=2 K=3 | 2.000 | 6.000 | 1.000 | 3.0 | 0.5 | 0.500 | 1.0 | 1.0 |" in text.splitlines()
    assert (tmp_path / "table.md").read_text().strip() == text and (tmp_path / "plot.png").stat().st_size > 5000
    assert environment("cpu")["torch"] == torch.__version__


@pytest.fixture
def operator_times(monkeypatch):
    pytest.importorskip("triton")
    from half_hour import operator_times

    return operator_times


def times_options(folder, seconds):
    from half_hour.measure import Options

    return Options("cpu", True, folder, "operators", time.monotonic() + seconds)


def test_times_are_written_at_once_and_gone_on_with(operator_times, tmp_path, monkeypatch):
    """Out of time in the middle: what was measured is there, and the next call adds the rest, nothing twice."""
    left = iter([100.0] * 5 + [-1.0])
    monkeypatch.setattr(type(times_options(tmp_path, 1)), "left", lambda self: next(left))
    with pytest.raises(operator_times.Unfinished):
        operator_times.measure_operators(times_options(tmp_path, 1))
    first = operator_times.rows_of(tmp_path / "operators.jsonl")
    assert len(first) == 2 + 5, "two bounds and five points"
    monkeypatch.setattr(type(times_options(tmp_path, 1)), "left", lambda self: 100.0)
    operator_times.measure_operators(times_options(tmp_path, 100))
    rows = operator_times.rows_of(tmp_path / "operators.jsonl")
    places = [operator_times.place(row) for row in rows]
    assert rows[:7] == first and len(set(places)) == len(places)
    assert len(rows) == 2 + len(POINTS) * (1 + len(operator_times.MODES)) + len(OPERATORS["loss"])
    ours = [row for row in rows if (row["operator"], row["provider"]) == ("loss", "fused")]
    reading, drawing = ([row for row in ours if row["noise"] == noise] for noise in ("stored", "fast"))
    assert [row["mode"] for row in reading] == list(OPERATORS["loss"])
    assert all(one["bytes"] > other["bytes"] for one, other in zip(reading, drawing, strict=True))
    assert all(row["problem"] == "" for row in rows)


def test_a_time_that_cannot_be_taken_is_told_and_the_next_one_is(operator_times, tmp_path, monkeypatch):
    """A graph that is not captured costs its figure; a device out of order ends the process, not the list."""
    graphs = iter([RuntimeError("no capture")])

    def graph_time(device, call):
        found = next(graphs, 1.0)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(operator_times, "graph_time", graph_time)
    options = times_options(tmp_path, 100)
    operator_times.measure_bounds(options, operator_times.timer("cpu"))
    copy, launch = operator_times.rows_of(options.file)
    assert copy["graph_ms"] is None and "no capture" in copy["problem"] and copy["median_ms"] > 0
    assert (launch["graph_ms"], launch["problem"]) == (1.0, "")
    monkeypatch.setattr(operator_times, "still_works", lambda device: False)
    with pytest.raises(operator_times.Broken):
        operator_times.measure_operators(options)
    broken = operator_times.rows_of(options.file)[2:]
    monkeypatch.setattr(operator_times, "still_works", lambda device: True)
    operator_times.measure_operators(options)
    places = [operator_times.place(row) for row in operator_times.rows_of(options.file)]
    assert len(broken) == 1 and len(set(places)) == len(places), "the next process leaves it out"


def test_stored_noise_is_measured_beside_its_prediction():
    from operators.predictions import _measured

    row = {"operator": "loss", "mode": "full", "provider": "fused", "siblings": 6, "device": "NVIDIA H200", "rows": 2,
           "dtype": "torch.bfloat16", "shape": "tiny", "graph_ms": 1.0, "median_ms": 9.0}  # fmt: skip
    rows = [row | {"noise": "stored"}, row | {"noise": "fast", "graph_ms": 2.0}]
    expected = 1e9 / (2 * 4 * 8 * 8)
    assert float(_measured(rows, "loss + gradient", 6, "H200", "stored")) == pytest.approx(expected, abs=0.1)
    assert float(_measured(rows, "loss + gradient", 6, "H200", "fast")) == pytest.approx(2 * expected, abs=0.1)
    assert _measured(rows, "loss + gradient", 6, "H100", "fast") == ""


def test_compiled_providers_keep_what_their_backward_needs():
    """Each for itself: `stored` may be the first that is compiled."""
    from operators.callables import PROVIDERS

    inputs = Inputs(SETTING)
    for name in ("stored", "compiled"):
        with torch._functorch.config.patch(donated_buffer=True):
            PROVIDERS[name](inputs)
            assert torch._functorch.config.donated_buffer is False, name


def test_rows_of_two_states_of_one_commit_are_told_apart(tmp_path, monkeypatch):
    """Uncommitted changes are part of what was measured."""
    from machine import environment as machine

    git = shutil.which("git")
    if git is None:
        pytest.skip("needs git")
    here = tmp_path / "benchmarks" / "machine" / "environment.py"
    here.parent.mkdir(parents=True)
    here.write_text("one")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "one"]):
        subprocess.run([git, "-C", tmp_path, *command], check=True)
    monkeypatch.setattr(machine, "__file__", str(here))
    clean = machine._commit()
    here.write_text("two")
    two = machine._commit()
    here.write_text("three")
    assert "dirty" not in clean and len({clean, two, machine._commit()}) == 3
    here.write_text("two")
    assert machine._commit() == two


def test_the_plan_of_times_begins_with_what_has_goals(operator_times):
    """Large calls first, K = 1, 6, 24, then other ways of the same loss; nothing that cannot fit."""
    jobs = operator_times.plan(SimpleNamespace(tiny=False, device="cuda"))
    assert {s.siblings for s, provider, _ in jobs[:6] if provider == "fused"} >= {1, 6}
    assert len(set(jobs)) == len(jobs) and {s.siblings for s, *_ in jobs} == {1, 6, 24}
    large = [s for s, *_ in jobs[: 3 * len(operator_times.MODES)]]
    assert all(bytes_moved("step", "forward", s) >= 2**26 for s in large)
    assert ("stored", 128) in {(provider, s.rows) for s, provider, _ in jobs}
    assert {s.shape for s, *_ in jobs} == set(operator_times.SHAPES)
    assert all(4 * s.elements * s.siblings <= operator_times.MAX_BYTES for s, *_ in jobs)


def test_a_loss_of_stored_noise_is_the_same_loss():
    """What the goal compares ours with: equal to the operator that is given the same noise."""
    import tempflow_kernels as tk
    from operators.eager import HIGH, LOW, eager_shared_loss

    i = Inputs(SETTING)
    noise = tk.normal_like(i.latents, i.key, SETTING.siblings)
    v_coef, std = (i.coef[:, column].view(-1, 1, 1, 1, 1) for column in (1, 2))
    found = eager_shared_loss(i.velocity, i.velocity_old, noise, i.advantages, v_coef, std)
    expected, _ = tk.branch_loss(i.velocity, i.velocity_old, i.advantages, i.terms, i.key, None, (LOW, HIGH))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
