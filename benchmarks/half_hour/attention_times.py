"""torch's attention backends at the shape of SD3.5-M at 512 px, forward in a captured graph."""

from __future__ import annotations

import torch
from half_hour.measure import Options
from half_hour.operator_times import graph_time, timer
from machine.environment import still_works
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

SHAPE = (48, 24, 1024 + 205, 64)
"""24 branches with both halves of guidance; heads, tokens, width of a head"""
TINY = (2, 2, 16, 8)
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}  # fmt: skip


def measure_attention(options: Options) -> None:
    """A row per backend: milliseconds, or why it cannot serve; `default` is what torch takes by itself."""
    shape = TINY if options.tiny else SHAPE
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    query, key, value = (torch.randn(shape, device=options.device, dtype=dtype) for _ in range(3))

    def call() -> None:
        scaled_dot_product_attention(query, key, value)

    flop = 4.0 * shape[0] * shape[1] * shape[2] ** 2 * shape[3]
    for name, backend in {"default": list(BACKENDS.values()), **BACKENDS}.items():
        try:
            with torch.no_grad(), sdpa_kernel(backend):
                call()  # one that cannot serve says so here, not within a capture
                seconds = 1e-3 * (graph_time(options.device, call) or timer(options.device)(call)[0])
        except RuntimeError as error:
            options.write(attention=name, milliseconds=None, problem=" ".join(str(error).split())[:200])
            if not still_works(options.device):
                raise SystemExit(f"the device is out of order since {name}") from error
            continue
        options.write(attention=name, milliseconds=1e3 * seconds, tflops=flop / seconds / 1e12, problem="")
        print(f"{name}: {1e3 * seconds:.3f} ms", flush=True)
