"""Seconds of a call on a GPU: of replays, of calls as they are, and what a capture that fails leaves behind."""

import contextlib
import gc
import warnings

import pytest
import torch

from tempflow.common.capture import CaptureBroken, CudaGraphs, waiting_is_an_error
from tempflow.common.timing import device_seconds

GPU = torch.device("cuda")


def a_second(cuda):
    def call():
        cuda.now += 1

    return call


def test_replays_are_timed_or_calls_as_they_are(cuda):
    assert device_seconds(a_second(cuda), GPU) == pytest.approx(0.1)
    assert device_seconds(a_second(cuda), GPU, captured=False) == pytest.approx(1)


def test_the_graph_is_gone_before_its_memory_is_given_back(cuda):
    device_seconds(a_second(cuda), GPU)
    assert cuda.held == [0]


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_a_calls_own_error_in_a_capture_is_told_as_it_is(cuda, kind):
    """Such as that of reading the generator's state, which a checkpoint does."""

    def call():
        if cuda.capturing:
            raise kind("the call's own words")

    with pytest.raises(kind, match="own words"):
        device_seconds(call, GPU)
    assert not cuda.broken


def test_a_capture_that_fails_keeps_no_memory(cuda):
    """Its graph is gone with the error, not when the garbage is collected."""

    def call():
        if cuda.capturing:
            raise torch.OutOfMemoryError("CUDA out of memory")

    gc.disable()
    try:
        with contextlib.suppress(torch.OutOfMemoryError):
            CudaGraphs(GPU).record(call)
        assert not cuda.graphs
    finally:
        gc.enable()


def test_a_call_that_waits_breaks_no_capture(cuda):
    with pytest.raises(RuntimeError, match="synchronizing"):
        device_seconds(cuda.wait_for_the_host, GPU)
    assert not cuda.broken and cuda.mode == 0


def test_a_capture_that_cuda_breaks_off_is_told_apart(cuda):
    def call():
        cuda.invalid |= cuda.capturing

    with pytest.raises(CaptureBroken):
        device_seconds(call, GPU)


def test_finding_waits_warns_of_nothing(cuda):
    """torch calls its mode a prototype at the first use in a process; other warnings are shown."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with waiting_is_an_error():
            assert cuda.mode == "error"
            warnings.warn("something else", stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["something else"] and cuda.mode == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_timing_on_a_gpu_leaves_launches_out():
    """A thousand small kernels: replayed they take less than launched; a call with `.item()` is only timed so."""
    value = torch.zeros(8, device=GPU)

    def many():
        for _ in range(1000):
            value.add_(1)

    def waits():
        return value.sum().item()

    assert device_seconds(many, GPU) < device_seconds(many, GPU, captured=False)
    with pytest.raises(RuntimeError):
        CudaGraphs(GPU).record(waits)
    assert device_seconds(waits, GPU, captured=False) > 0
