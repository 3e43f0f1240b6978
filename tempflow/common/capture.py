"""Work on tensors that stay where they are, captured in a CUDA graph, and what a capture that fails leaves behind."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class CaptureBroken(Exception):
    """A capture that CUDA itself broke off; from then on the process must not go on sampling or learning.

    torch's `capture_end` stops before it has closed the graph's memory pool: the allocator believes for ever that a
    capture is under way, and never again returns cached memory, not even to serve an allocation that does not fit.
    """


class CudaGraphs:
    """Repeats the work as one launch of a CUDA graph.

    All graphs share one memory pool and are replayed on one stream, one after the other; nothing in the pool has to
    outlive a replay, for the work leaves its results in tensors from outside of it.
    """

    WARM_UP = 3
    """calls before the capture: autotuning, lazy initialisation and workspaces must not fall into it"""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], object]) -> Callable[[], object]:
        """
        Raises:
            RuntimeError: the work fails, or makes the host wait; torch's own words.
            CaptureBroken: CUDA does not capture it all the same.
        """
        before = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(before)
        with torch.cuda.stream(self.stream):
            for _ in range(self.WARM_UP):
                work()
            with waiting_is_an_error():
                work()  # within the capture the same would break it
        try:
            graph = self._captured(work)
        finally:
            torch.cuda.set_stream(before)  # torch leaves the capturing one in place where a capture fails
        before.wait_stream(self.stream)
        return graph.replay

    def _captured(self, work: Callable[[], object]) -> torch.cuda.CUDAGraph:
        graph, failed = torch.cuda.CUDAGraph(), []

        def watched() -> None:
            try:
                work()
            except RuntimeError as error:
                failed.append(error)
                raise

        try:
            # thread_local: a thread that decodes beside the sampler may allocate memory meanwhile
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                watched()
        except RuntimeError as error:
            if error in failed:  # such as too little memory: the work's own error, and the capture was ended in order
                raise
            raise CaptureBroken(str(error)) from error
        finally:
            failed.clear()  # an error holds this frame, and with it the graph's memory
        return graph


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Within this context an operator that makes the host wait for the GPU raises a RuntimeError, in all threads."""
    before = torch.cuda.get_sync_debug_mode()
    _let_waiting("error")
    try:
        yield
    finally:
        _let_waiting(before)


def _let_waiting(mode: int | str) -> None:
    """Sets torch's mode without its warning that it does not find all waits: a capture finds the others."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
        torch.cuda.set_sync_debug_mode(mode)
