"""What a network row costs and what the device can do: FLOPs by formula, peak and bandwidth by measuring.

A multiplication and an addition are two operations. Counted are matrix products, convolutions and attention; norms,
activations, adapters (under 2 % at rank 32) and what gradient checkpointing computes again are not: utilisation is
slightly understated. `tests/benchmarks/test_rollouts.py` holds the formulas against `torch.utils.flop_counter`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

TIME_FREQUENCIES = 256
"""width of diffusers' sinusoidal time embedding"""


@dataclass(frozen=True)
class RowCost:
    """Floating-point operations of one network row, forward."""

    linear: float
    attention: float

    @property
    def forward(self) -> float:
        return self.linear + self.attention

    def backward(self, adapters: bool) -> float:
        """Adapters on frozen weights need the gradient of inputs only; attention always needs all of its operands'."""
        return self.linear * (1 if adapters else 2) + 2 * self.attention


def sd3_row(config: Mapping, image_tokens: int, text_tokens: int) -> RowCost:
    """One row of diffusers' SD3Transformer2DModel with that configuration."""
    width, layers = config["num_attention_heads"] * config["attention_head_dim"], config["num_layers"]
    dual = len(config["dual_attention_layers"])
    square, tokens = width * width, image_tokens + text_tokens
    patch = config["patch_size"] ** 2
    blocks = 12 * square * (image_tokens * layers + text_tokens * (layers - 1)) + 3 * square * text_tokens
    blocks += 4 * square * image_tokens * dual
    modulation = square * (12 * (layers - 1) + 8 + 3 * dual)
    ends = patch * image_tokens * width * (config["in_channels"] + config["out_channels"]) + 2 * square
    ends += config["joint_attention_dim"] * width * text_tokens
    ends += (TIME_FREQUENCIES + config["pooled_projection_dim"]) * width + 2 * square
    attention = 2 * width * (layers * tokens**2 + dual * image_tokens**2)
    return RowCost(2.0 * (blocks + modulation + ends), 2.0 * attention)


def flux_row(config: Mapping, image_tokens: int, text_tokens: int) -> RowCost:
    """One row of diffusers' FluxTransformer2DModel with that configuration."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    double, single = config["num_layers"], config["num_single_layers"]
    square, tokens = width * width, image_tokens + text_tokens
    modulation, embedders = square * (12 * double + 3 * single), 2 + bool(config["guidance_embeds"])
    ends = width * image_tokens * (config["in_channels"] + (config["out_channels"] or config["in_channels"]))
    ends += config["joint_attention_dim"] * width * text_tokens + 2 * square
    ends += (TIME_FREQUENCIES * (embedders - 1) + config["pooled_projection_dim"]) * width + embedders * square
    linear = 12 * square * tokens * (double + single) + modulation + ends
    return RowCost(2.0 * linear, 4.0 * width * tokens**2 * (double + single))


ROW_COSTS = {"SD3Transformer2DModel": sd3_row, "FluxTransformer2DModel": flux_row}


def counted(function: Callable[[], object]) -> float:
    """FLOPs of a call as torch counts them; works on the meta device, where nothing is computed."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function()
    return float(counter.get_total_flops())


def seconds_of(function: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    """Shortest seconds of a call that has been called once before: what the device can do, not what it mostly does."""
    times = []
    for turn in range(repeats + 1):
        synchronise(device)
        start = time.perf_counter()
        function()
        synchronise(device)
        if turn:
            times.append(time.perf_counter() - start)
    return min(times)


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of several large square matrix products."""
    sides = (4096, 8192, 16384) if device.type == "cuda" else (256, 512, 1024)
    best = 0.0
    for side in sides:
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty(side, side, device=device, dtype=dtype)
        calls = max(1, int(4e12 / (2 * side**3))) if device.type == "cuda" else 1

        def products(left=left, right=right, out=out, calls=calls):
            for _ in range(calls):
                torch.mm(left, right, out=out)

        best = max(best, 2.0 * side**3 * calls / seconds_of(products, device))
    return best


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes."""
    count = 1 << (28 if device.type == "cuda" else 25)
    source, target = torch.empty(count, device=device), torch.empty(count, device=device)
    return 8.0 * count / seconds_of(lambda: target.copy_(source), device)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
