"""From host to device without waiting, from shares to a whole, and the blocks that networks repeat."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """Host values on `device`. A GPU takes them from pinned memory, which torch keeps until they have arrived."""
    if torch.device(device).type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a transformer, in order."""
    return [block for part in network.children() if isinstance(part, nn.ModuleList) for block in part]


def whole(tensor: Tensor) -> Tensor:
    """A tensor whose shares lie in several processes (a DTensor) in full, in all of them; any other itself."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def own_share(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    local = getattr(tensor, "to_local", None)
    return tensor if local is None else local()


@torch.no_grad()
def gather(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Copies of full tensors in main memory, one at a time on the device; for those in shares all processes call it.

    Args:
        keep: False in processes that only take part: they get nothing.
    """
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            found[name] = full.to("cpu", copy=True).contiguous()
    return found


def chunks(total: int, size: int) -> Iterator[slice]:
    """Consecutive slices of `size` that cover range(total); the last may be shorter."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
