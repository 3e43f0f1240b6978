"""Launches without Triton's own look-up of the compiled kernel, which takes longer than the rest of a small call.

Triton compiles a kernel anew for each dtype and 16-byte alignment of its pointers, for numbers that are 1 or multiples
of 16, and for each set of constants. Here the compiled kernel is kept under a key that tells all of these apart, and
more (numbers by value). What is not known yet, and everything on AMD, whose compiler also looks at the sizes of
allocations, goes through Triton's launcher.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .noise import LAUNCH

OPTIONS = {"num_warps": 4, **LAUNCH}


class Launcher:
    """A Triton kernel whose arguments are pointers, then integers, then compile-time constants."""

    LIMIT = 256
    """Compiled kernels that are kept; beyond that all are looked up anew."""

    def __init__(self, kernel, keep: bool = not torch.version.hip):
        self.kernel, self.keep, self.compiled = kernel, keep, {}

    def __call__(self, programs: int, tensors: Sequence[Tensor], numbers: tuple, constants: tuple) -> None:
        """
        Args:
            tensors: contiguous, on the current device. numbers, constants: in the order of the kernel's arguments.
        """
        device = tensors[0].get_device()
        key = (device, numbers, constants, *[(tensor.dtype, tensor.data_ptr() % 16) for tensor in tensors])
        known = self.compiled.get(key)
        if known is None:
            self._first(key, programs, (*tensors, *numbers, *constants))
        else:
            known[(programs, 1, 1)](*tensors, *numbers, *constants)

    def _first(self, key: tuple, programs: int, arguments: tuple) -> None:
        compiled = self.kernel[(programs,)](*arguments, **OPTIONS)
        if len(self.compiled) >= self.LIMIT:
            self.compiled.clear()
        if self.keep and compiled is not None:  # the interpreter compiles nothing
            self.compiled[key] = compiled
