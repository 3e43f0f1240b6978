"""What network calls would hold in memory, without weights: operators run on `meta` tensors, which have shapes only.

Every storage that comes into being is counted until it goes, in forward and backward pass and recomputation, so that
the peak follows from the architecture itself. Two things are put in place of what a GPU does: the precision that
autocast chooses for an operator, and attention that keeps queries, keys, values, output and one number a row (flash
attention, arXiv 2205.14135). Not counted: the allocator's rounding, and workspaces of cuBLAS and cuDNN.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

META = torch.device("meta")
LOWER = {F.linear, F.conv1d, F.conv2d, F.conv3d, torch.matmul, torch.mm, torch.bmm, torch.baddbmm, torch.addmm,
         torch.einsum, Tensor.matmul, Tensor.__matmul__, Tensor.bmm}  # fmt: skip
"""operators that autocast runs in the lower precision"""
UPPER = {F.layer_norm, F.rms_norm, F.group_norm, F.softmax, torch.softmax, Tensor.softmax, torch.pow, Tensor.pow,
         Tensor.__pow__, torch.rsqrt, Tensor.rsqrt, torch.exp, Tensor.exp, torch.sum, Tensor.sum, torch.cumsum,
         Tensor.cumsum}  # fmt: skip
"""operators that autocast runs in fp32 (both as torch 2.13 lists them for CUDA)"""


@dataclass(frozen=True)
class Peak:
    """Bytes of a rehearsed call beside what was there before."""

    peak: int
    kept: int
    """what the forward pass keeps for the backward pass, or returns"""


def rehearse(call: Callable[[], Tensor], dtype: torch.dtype, backward: bool, present: Iterable[Tensor]) -> Peak:
    """Runs `call` on meta tensors, and the backward pass of its result.

    Args:
        dtype: the precision of autocast; fp32 means none.
        present: tensors that are not counted: parameters, buffers, gradients.
    """
    ledger = Ledger(present)
    with ledger, torch.set_grad_enabled(backward):
        with AsOnGPU(dtype):
            output = call()
        kept = ledger.live
        if backward:
            torch.autograd.backward(output, torch.empty_like(output))
    return Peak(ledger.peak, kept)


class Ledger(TorchDispatchMode):
    """Bytes of all storages that operators have made and that still live, and their largest sum so far."""

    def __init__(self, present: Iterable[Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self.present = [tensor.untyped_storage() for tensor in present]
        self.known: dict[int, weakref.ref | None] = {storage._cdata: None for storage in self.present}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._enter(tensor)
        return result

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known and tensor.device == META:
            self.known[key] = weakref.ref(storage, lambda _: self._leave(key, size))
            self.live += size
            self.peak = max(self.peak, self.live)

    def _leave(self, key: int, size: int) -> None:
        del self.known[key]
        self.live -= size


class AsOnGPU(TorchFunctionMode):
    """Autocast's choice of precision, with its cache of trained weights in the lower one, and flash attention."""

    active = False

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.cache: dict[int, Tensor] = {}

    def __enter__(self) -> AsOnGPU:
        AsOnGPU.active = True
        return super().__enter__()

    def __exit__(self, *reason: Any) -> None:
        AsOnGPU.active = False
        self.cache.clear()
        super().__exit__(*reason)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, autocast = kwargs or {}, self.dtype != torch.float32
        if func is F.scaled_dot_product_attention:
            query, key, value = args[:3] if len(args) >= 3 else (kwargs["query"], kwargs["key"], kwargs["value"])
            parts = (query, key, value)
            return FlashAttention.apply(*(self._lower(part) for part in parts) if autocast else parts)
        if autocast and func in LOWER:
            args, kwargs = tree_map_only(Tensor, self._lower, (args, kwargs))
        elif autocast and func in UPPER:
            args, kwargs = tree_map_only(Tensor, self._upper, (args, kwargs))
        return func(*args, **kwargs)

    def _lower(self, tensor: Tensor) -> Tensor:
        if not (tensor.requires_grad and tensor.is_leaf and tensor.dtype == torch.float32):
            return tensor.to(self.dtype) if tensor.is_floating_point() else tensor
        if id(tensor) not in self.cache:
            self.cache[id(tensor)] = tensor.to(self.dtype)
        return self.cache[id(tensor)]

    @staticmethod
    def _upper(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.is_floating_point() else tensor


class FlashAttention(torch.autograd.Function):
    """Shapes and memory of flash attention: (..., L, E), (..., S, E), (..., S, V) -> (..., L, V)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def enable_checkpointing(module: nn.Module, dtype: torch.dtype) -> None:
    """Gradient checkpointing whose recomputation, too, happens as on a GPU."""

    def run(block: nn.Module, *arguments: Any) -> Any:
        def in_mode(*inputs: Any) -> Any:
            with nullcontext() if AsOnGPU.active else AsOnGPU(dtype):
                return block(*inputs)

        return checkpoint(in_mode, *arguments, use_reentrant=False)

    module.enable_gradient_checkpointing(run)


def give_precision(module: nn.Module, dtype: torch.dtype, trained: bool = False) -> None:
    """Frozen parameters and buffers in the precision they are loaded in; trained parameters stay in fp32, or not."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point() and (trained or not tensor.requires_grad):
            tensor.data = tensor.data.to(dtype)
