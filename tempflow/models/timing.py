"""How long a network call keeps a device busy, without the time that its launches take.

An eager call of a large network launches well over a thousand kernels; at few rows the host is slower than the GPU, and
what one kernel gains is hidden. So the call is captured in a CUDA graph and replayed.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from tempflow.common.errors import BadInput

CALLS, ROUNDS = 3, 3
"""calls between two looks at the clock, and how often; the shortest counts"""


def device_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, after one to warm up. On a GPU by events around replays of its CUDA graph.

    A call in which the host waits for the GPU cannot be captured and is timed as it is.

    Raises:
        BadInput: the call could not be captured though the host does not wait in it.
    """
    call()
    if device.type != "cuda":
        return min(_by_clock(call) for _ in range(ROUNDS))
    try:
        replay = call if _waits(call) else _captured(call)
        return min(_by_events(replay) for _ in range(ROUNDS))
    finally:
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


def _waits(call: Callable[[], object]) -> bool:
    """Whether the host waits for the GPU in a call. Found out first: a capture that it broke off would leave torch's
    allocator unable to give memory back for the rest of the process.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def _captured(call: Callable[[], object]) -> Callable[[], object]:
    """The replay of a call, or where its graph does not fit the memory the call itself."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # libraries choose kernels and workspaces by stream, outside of the capture
    torch.cuda.current_stream().wait_stream(side)
    try:
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            call()
    except torch.OutOfMemoryError:
        return call
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        hint = f"the network call cannot be captured ({reason}); name a backend, such as native"
        raise BadInput("model.attention", "auto", hint) from error
    return graph.replay
