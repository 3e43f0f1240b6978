"""Speed of the kernels: `pytest benchmarks/operators/bench_operators.py --benchmark-only --benchmark-json=out.json`.

Two sizes in about a minute; KERNEL_BENCH=full in the environment measures all sizes (below ten minutes on two cores).
On a machine that others use, time one thread by its own clock: OMP_NUM_THREADS=1 and
--benchmark-timer=time.process_time.

Then `python benchmarks/operators/report.py out.json benchmarks/results/NAME` writes a JSON row per figure, a table and
a plot. On a GPU `benchmarks/first_half_hour.py` measures the same callables with finer timers.
"""

import os
import time

import pytest
import torch
from machine.environment import environment, peak_bytes, synchronised
from operators.callables import COMPILED, POINTS, Inputs, Setting, bytes_moved, callables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUICK = [("sd35_512", 4, 6), ("sd35_512", 1, 1)]
FULL = [
    *QUICK, ("sd35_512", 16, 6), ("sd35_512", 4, 24), ("sd35_512", 64, 1),
    ("sd35_1024", 4, 6), ("sd35_1024", 1, 24),
    ("flux_1024", 1, 1), ("flux_1024", 4, 6), ("flux_1024", 1, 24),
    ("wan_480p", 1, 1), ("wan_480p", 1, 6),
]  # fmt: skip
COMPILED_SIZES = [("sd35_512", 4, 6), ("sd35_512", 1, 1), ("sd35_512", 4, 24), ("sd35_1024", 4, 6)]
"""Compilation takes longer than all measurements of a size."""
SIZES = FULL if os.environ.get("KERNEL_BENCH") == "full" else QUICK
COPY_BYTES = 2**28
RUNS = [
    (size, provider, operator, mode)
    for size in SIZES
    for provider in ("fused", "eager", "compiled") if provider != "compiled" or size in COMPILED_SIZES
    for operator, mode in POINTS if provider != "compiled" or operator in COMPILED
]  # fmt: skip


@pytest.fixture(scope="module")
def prepared():
    """The callables of one size and provider, the last one asked for; dropped at the end."""
    kept = {}

    def prepare(size, provider):
        if (size, provider) not in kept:
            kept.clear()
            kept[size, provider] = callables(Inputs(Setting(*size, device=DEVICE)), provider)
        return kept[size, provider]

    yield prepare
    kept.clear()


@pytest.fixture(scope="session")
def clock(pytestconfig):
    """Which clock times: `--benchmark-timer=time.process_time` tells one thread's own time on a busy machine."""
    return {"clock": "processor" if "process_time" in str(pytestconfig.getoption("benchmark_timer")) else "wall"}


def rounds(call):
    """Between 5 and 30, about half a second in all; the first call compiles and is not counted."""
    call()
    start = time.perf_counter()
    call()
    return int(min(30, max(5, 0.5 / (time.perf_counter() - start))))


@pytest.mark.parametrize(("size", "provider", "operator", "mode"), RUNS, ids=lambda part: str(part))
def test_operator(benchmark, prepared, clock, size, provider, operator, mode):
    setting = Setting(*size, device=DEVICE)
    call = synchronised(prepared(size, provider)[operator, mode], DEVICE)
    benchmark.pedantic(call, rounds=rounds(call), warmup_rounds=1)
    benchmark.extra_info |= {
        "operator": operator,
        "mode": mode,
        "provider": provider,
        **setting.row,
        "bytes": bytes_moved(operator, mode, setting),
        "peak_bytes": peak_bytes(call, DEVICE),
        **clock,
        **environment(DEVICE),
    }


def test_copy_bandwidth(benchmark, clock):
    """The bound: bytes read and written per second by a plain copy."""
    source = torch.randn(COPY_BYTES // 4, device=DEVICE)
    target = torch.empty_like(source)
    bound = {"operator": "copy", "provider": "bound", "bytes": 2 * COPY_BYTES}
    benchmark.extra_info |= bound | clock | environment(DEVICE)
    benchmark.pedantic(synchronised(lambda: target.copy_(source), DEVICE), rounds=15, warmup_rounds=3)


def test_launch_floor(benchmark, clock):
    """What one operation costs that does nothing."""
    value = torch.zeros(1, device=DEVICE)
    bound = {"operator": "launch", "provider": "bound", "bytes": 8}
    benchmark.extra_info |= bound | clock | environment(DEVICE)
    benchmark.pedantic(synchronised(lambda: value.add_(1), DEVICE), rounds=200, warmup_rounds=20)
