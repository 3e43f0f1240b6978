"""A kept kernel is the one that Triton itself would have chosen, and gets what Triton would have given it."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
import triton
from operators.host_cost import NoDriver
from tempflow_kernels.gpu import launch, transition
from tempflow_kernels.gpu import ops as triton_ops
from triton.runtime import driver

ROWS = 2
PLAIN = {"elements": 2048, "siblings": 6, "dtype": torch.bfloat16, "offset": 0, "noise": "exact", "guidance": None}
OTHERS = [
    {}, {"dtype": torch.float32}, {"offset": 1}, {"siblings": 1}, {"siblings": 16}, {"elements": 2047},
    {"noise": "fast"}, {"guidance": 4.5}, {"guidance": 2.0},
]  # fmt: skip


@pytest.fixture
def launched(monkeypatch):
    """(kernel, its arguments) of every launch, by a driver that launches nothing."""
    seen, numbers = [], itertools.count(1)

    class Recording(NoDriver):
        class utils(NoDriver.utils):
            load_binary = staticmethod(lambda *_: (1, next(numbers), 32, 0, 1024))

        @staticmethod
        def launcher_cls(*_):
            return lambda *given: seen.append((given[4], given[9:]))

    monkeypatch.setattr(driver, "_active", Recording())
    return seen


def step_arguments(**changes):
    """What a step launches with: tensors, numbers, constants."""
    asked = PLAIN | changes
    elements, siblings, dtype = asked["elements"], asked["siblings"], asked["dtype"]
    latents, velocity = (torch.zeros(ROWS * elements + 16, dtype=dtype)[asked["offset"] :] for _ in range(2))
    size = triton_ops.geometry(ROWS, elements, siblings, triton_ops.BLOCK)
    tensors = (latents, velocity, velocity, torch.zeros(ROWS, 3), torch.zeros(ROWS, 2, dtype=torch.int64),
               torch.zeros(ROWS, siblings, elements), torch.zeros(ROWS * size.blocks * siblings))  # fmt: skip
    numbers = (siblings, elements, size.blocks, size.span)
    pair = triton_ops.NOISES[asked["noise"]]["cuda"]
    return tensors, numbers, (asked["guidance"], pair, size.whole, triton_ops.BLOCK)


def test_a_kept_kernel_is_the_one_that_triton_would_choose(launched):
    kernel = triton.jit(transition.step_kernel.fn)  # one without kernels of other tests
    launcher, every = launch.Launcher(kernel, keep=True), [step_arguments(**changes) for changes in OTHERS]
    for given in every:
        launcher(1, *given)
    assert len(launcher.compiled) == len(OTHERS)
    for given in reversed(every):
        launched.clear()
        launcher(1, *given)
        kernel[(1,)](*itertools.chain(*given), **launch.OPTIONS)
        (kept, ours), (chosen, theirs) = launched
        assert kept == chosen and len(ours) == len(theirs)
        assert all(a is b or a == b for a, b in zip(ours, theirs, strict=True) if not isinstance(a, torch.Tensor))
        assert all(a is b for a, b in zip(ours, theirs, strict=True) if isinstance(a, torch.Tensor))
    assert len(launcher.compiled) == len(OTHERS), "nothing was compiled again"


def test_few_kernels_are_kept_and_none_where_that_is_not_safe(launched, monkeypatch):
    monkeypatch.setattr(launch.Launcher, "LIMIT", 2)
    launcher = launch.Launcher(transition.step_kernel, keep=True)
    for siblings in (2, 3, 4, 5, 6):
        launcher(1, *step_arguments(siblings=siblings))
        assert 1 <= len(launcher.compiled) <= 2
    through_triton = launch.Launcher(transition.step_kernel, keep=False)
    through_triton(1, *step_arguments())
    assert not through_triton.compiled and len(launched) == 6
