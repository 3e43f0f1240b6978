"""The precisions a user may name, and the one that is taken where none is named."""

from __future__ import annotations

from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def default_precision(device: Any, on_cpu: str = "fp32") -> str:
    """bf16 on a GPU, where fp32 products are many times slower and fp16 may overflow; `on_cpu` on a CPU.

    Args:
        device: as torch takes it; `meta`, on which memory is planned, stands for a GPU.
    """
    return on_cpu if torch.device(device).type == "cpu" else "bf16"
