"""Speed of the kernels: `pytest benchmarks/bench_kernels.py --benchmark-only --benchmark-json=out.json`.

Then `python benchmarks/kernel_report.py out.json benchmarks/results/NAME` writes one JSON row per figure, a table and
a plot. On a GPU `benchmarks/gpu_check.py` measures the same callables with finer timers.
"""

import pytest
import torch
from kernel_bench import (
    OPERATORS,
    SHAPES,
    Inputs,
    Setting,
    bytes_moved,
    eager,
    environment,
    fused,
    peak_bytes,
    synchronised,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CPU_SETTINGS = [("sd35_512", 4, 6), ("sd35_512", 1, 1), ("sd35_512", 4, 24), ("sd35_1024", 4, 6)]
GPU_SETTINGS = [
    (shape, rows, siblings)
    for shape in SHAPES if shape != "tiny"
    for rows, siblings in ((1, 1), (4, 6), (16, 6), (4, 24), (64, 1))
]  # fmt: skip
SETTINGS = [Setting(*size, device=DEVICE) for size in (GPU_SETTINGS if DEVICE == "cuda" else CPU_SETTINGS)]
COPY_BYTES = 2**28
PROVIDERS = {
    "fused": fused,
    "eager": eager,
    "compiled": lambda inputs: eager(inputs, lambda function: torch.compile(function, dynamic=False)),
}


def record(benchmark, operator, provider, setting, call):
    """Time one callable and keep with the figure what is needed to read it later."""
    call = synchronised(call, DEVICE)
    size = {"shape": setting.shape, "rows": setting.rows, "siblings": setting.siblings, "dtype": str(setting.dtype)}
    benchmark.extra_info |= {
        "operator": operator,
        "provider": provider,
        **size,
        "bytes": bytes_moved(operator, setting),
        "peak_bytes": peak_bytes(call, DEVICE),
        **environment(DEVICE),
    }
    benchmark.pedantic(call, rounds=15, warmup_rounds=3)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.label)
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_operator(benchmark, operator, provider, setting):
    if (operator, provider) == ("normal", "compiled"):
        pytest.skip("torch.compile has nothing to fuse around one randn")
    torch._dynamo.reset()
    record(benchmark, operator, provider, setting, PROVIDERS[provider](Inputs(setting))[operator])


def test_copy_bandwidth(benchmark):
    """The bound: bytes read and written per second by a plain copy."""
    source = torch.randn(COPY_BYTES // 4, device=DEVICE)
    target = torch.empty_like(source)
    benchmark.extra_info |= {"operator": "copy", "provider": "bound", "bytes": 2 * COPY_BYTES, **environment(DEVICE)}
    benchmark.pedantic(synchronised(lambda: target.copy_(source), DEVICE), rounds=15, warmup_rounds=3)


def test_launch_floor(benchmark):
    """What one operation costs that does nothing."""
    value = torch.zeros(1, device=DEVICE)
    benchmark.extra_info |= {"operator": "launch", "provider": "bound", "bytes": 8, **environment(DEVICE)}
    benchmark.pedantic(synchronised(lambda: value.add_(1), DEVICE), rounds=200, warmup_rounds=20)
