"""From host to device without waiting."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """Host values on `device`. A GPU takes them from pinned memory, which torch keeps until they have arrived."""
    if torch.device(device).type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def chunks(total: int, size: int) -> Iterator[slice]:
    """Consecutive slices of `size` that cover range(total); the last may be shorter."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
