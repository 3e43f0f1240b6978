"""Linear layers in 8-bit floating point (e4m3) for sampling: a scale per row of the input and per output of the weight.

Scales per row keep rows of a batch independent: what a branch becomes does not depend on those beside it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

LARGEST = torch.finfo(torch.float8_e4m3fn).max
SMALLEST_SCALE = 1e-12
"""stands for the scale of a row of zeros"""
MULTIPLE = 16
"""the product takes sides that are multiples of this"""
SENSITIVE = ("norm", "embed", "_mod")
"""parts of names of layers inside blocks that keep their precision: they scale and shift whole streams; `_mod` is in
Qwen's img_mod and in the others' modulation"""


class Float8Linear(nn.Module):
    """A linear layer without gradient; (..., I) in any precision to (..., O) bf16. Its storage never moves."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.register_buffer("values", torch.empty_like(weight, dtype=torch.float8_e4m3fn))
        self.register_buffer("scale", torch.empty(1, len(weight), device=weight.device))
        self.bias = bias
        self.refresh(weight)

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Takes over a weight (O, I) of any precision, in place."""
        values, scale = to_float8(weight)
        self.values.copy_(values)
        self.scale.copy_(scale.t())

    def forward(self, inputs: Tensor) -> Tensor:
        values, scale = to_float8(inputs.reshape(-1, inputs.shape[-1]))
        product = torch._scaled_mm(
            values, self.values.t(), scale_a=scale, scale_b=self.scale, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        if self.bias is not None:
            product = product + self.bias.to(product.dtype)
        return product.view(*inputs.shape[:-1], -1)


def to_float8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(R, I) to e4m3 values (R, I) and fp32 scales (R, 1), whose product is `rows` up to rounding."""
    rows = rows.float()
    scale = (rows.abs().amax(dim=1, keepdim=True) / LARGEST).clamp_min(SMALLEST_SCALE)
    return (rows / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def takes_float8(name: str, layer: nn.Module, smallest: int) -> bool:
    """A plain linear layer, large enough that its product outweighs the conversion of its input, and not sensitive."""
    if type(layer) is not nn.Linear or any(part in name for part in SENSITIVE):
        return False
    sides = (layer.in_features, layer.out_features)
    return min(sides) >= smallest and not any(side % MULTIPLE for side in sides)


def why_not(device: torch.device, dtype: torch.dtype) -> str:
    """Why such layers cannot serve; empty if they can. The CPU computes them too, but slower."""
    if dtype != torch.bfloat16:
        return "its layers answer in bf16; set model.dtype=bf16"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return "this GPU has no 8-bit floating point (Ada, Hopper and newer have)"
    return ""


def describe_layers(eights: Iterable[str], kept: Iterable[str]) -> str:
    """What became of the linear layers inside blocks, in words: names without the number of their block."""
    eights, kept = list(eights), list(kept)
    names = sorted({".".join(part for part in name.split(".")[1:] if not part.isdigit()) for name in kept})
    return f"{len(eights)} linear layers of blocks in fp8, {len(kept)} stay ({', '.join(names) or 'none'})"
