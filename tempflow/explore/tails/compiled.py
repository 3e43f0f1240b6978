"""Regional compilation: the repeated blocks of a network, compiled once for all of them, where and while asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

RECOMPILE_LIMIT = 64
"""Kinds of block x shapes x gradient or none, per class of block. torch's own limit of 8 would stop without an error:
blocks beyond it run uncompiled."""


AUTOTUNED = "max-autotune-no-cudagraphs"
"""torch.compile's mode that times more kernels than it would choose from else; graphs are captured around the blocks"""


class CompiledBlocks:
    """Blocks whose forward pass is torch.compile's within a context, and their own outside of it.

    Fixed shapes: a call with another number of rows compiles again. `mode` is torch.compile's.
    """

    def __init__(self, blocks: Sequence[nn.Module], mode: str | None = None):
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
        self.blocks = list(blocks)
        own = [type(block).forward.__get__(block) for block in self.blocks]
        self.forwards = [torch.compile(forward, dynamic=False, mode=mode) for forward in own]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        for block, forward in zip(self.blocks, self.forwards, strict=True):
            block.forward = forward
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward
