"""The benchmarks measure the same thing on both sides, report every figure, and end in time with the right status."""

import json
import sys
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
    for call in kernels_alone(inputs).values():
        call()
    measured = {"normal_like", "transition_step", "transition_log_prob", "log_ratio", "branch_loss"}
    others = {"BranchLossStats", "backend_info", "fold_key", "gaussian_terms", "philox4x32"}
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
def gpu_check():
    pytest.importorskip("triton")
    from operators import gpu_check

    return gpu_check


def test_gpu_check_judges_parts_by_what_their_process_did(gpu_check, tmp_path, monkeypatch):
    script = tmp_path / "part.py"
    script.write_text(
        "import subprocess, sys, time\n"
        "part = sys.argv[sys.argv.index('--part') + 1]\n"
        "if part == 'sanitizer':\n"
        "    subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "sys.exit({'numerics': 1, 'determinism': 0, 'graph': 77}[part])\n"
    )
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    monkeypatch.setattr(gpu_check, "LIMITS", dict.fromkeys(gpu_check.PARTS, 20) | {"sanitizer": 1})
    options = SimpleNamespace(
        out=tmp_path, device="cpu", tiny=True, parts=["numerics", "determinism", "graph", "sanitizer"],
        deadline=time.monotonic() + 60,
    )  # fmt: skip
    start = time.monotonic()
    assert gpu_check.run_parts(options) == 1
    assert time.monotonic() - start < 40, "a part's children are ended with it"
    found = json.loads((tmp_path / "verdicts.json").read_text())
    assert [found[name] for name in options.parts] == ["FAILED", "ok", "skipped", "OUT OF TIME"]
    options.parts = ["determinism", "graph"]
    assert gpu_check.run_parts(options) == 0
    options.deadline = time.monotonic()
    assert gpu_check.run_parts(options) == 1, "no part starts when the time is over"


def test_gpu_check_without_a_gpu_says_so(gpu_check, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert gpu_check.main() == 2
    assert "torch sees no GPU" in capsys.readouterr().err


def test_gpu_speed_writes_each_row_at_once_and_stops_in_time(gpu_check, tmp_path, monkeypatch):
    from operators import gpu_speed

    options = SimpleNamespace(out=tmp_path, device="cpu", tiny=True, deadline=4.5)
    seen, measure = [], gpu_speed.timer("cpu")

    def counting(call):
        seen.append(len((tmp_path / "rows.jsonl").read_text().splitlines()))
        return measure(call)

    clock = SimpleNamespace(monotonic=lambda: len(seen), perf_counter=time.perf_counter)
    monkeypatch.setattr(gpu_speed, "time", clock)
    monkeypatch.setattr(gpu_speed, "timer", lambda device: counting)
    gpu_speed.measure_speed(options)
    assert seen == [0, 1, 2, 3, 4] and len(kernel_report.read(tmp_path)) == 5


def test_gpu_plan_puts_the_core_first_and_leaves_out_what_cannot_fit():
    from operators import gpu_speed

    plan = gpu_speed.plan(SimpleNamespace(tiny=False, device="cuda"))
    assert [provider for _, provider in plan[:6]] == ["fused", "eager", "fused", "eager", "compiled", "compiled"]
    assert len(set(plan)) == len(plan) and {s.siblings for s, _ in plan} == {1, 6, 24}
    assert {s.rows for s, _ in plan} == {1, 4, 16, 64} and {s.shape for s, _ in plan} == set(gpu_speed.SHAPES)
    assert all(4 * s.elements * s.siblings <= gpu_speed.MAX_BYTES for s, _ in plan)
