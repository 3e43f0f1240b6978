"""How long a call keeps a device busy, without the time that its launches take.

An eager call of a large network launches well over a thousand kernels; at few rows the host is slower than the GPU, and
what one kernel gains is hidden. So the call is captured in a CUDA graph and replayed.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from tempflow.common.capture import CudaGraphs

CALLS, ROUNDS = 3, 3
"""calls between two looks at the clock, and how often; the shortest counts"""


def device_seconds(call: Callable[[], object], device: torch.device, captured: bool = True) -> float:
    """Seconds of one call, warmed up. On a GPU by events around replays of its CUDA graph or, not `captured`, around
    calls, in which launches count.

    Raises:
        RuntimeError: the call fails, or `captured` and it cannot be; torch's own words, and nothing has come to harm.
        CaptureBroken: CUDA broke the capture off, and this process must not go on.
    """
    replay, on_gpu = call, device.type == "cuda"
    try:
        if on_gpu and captured:
            replay = CudaGraphs(device).record(call)
        replay()
        return min((_by_events if on_gpu else _by_clock)(replay) for _ in range(ROUNDS))
    finally:
        del replay  # a graph holds its memory, which could not be given back
        if on_gpu:
            torch.cuda.empty_cache()


def _by_clock(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS


def _by_events(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(CALLS):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / CALLS
