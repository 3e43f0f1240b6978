"""What CLIP-like encoders do to images before looking at them, in plain torch on any device.

The official pipelines resize in Pillow, whose bicubic and bilinear filters widen with the scale (antialiasing)
and which rounds and clips to levels after its first pass and again after its second one. torch's antialiased
`interpolate` uses the same filters; in two passes of the same order and rounding it gives Pillow's levels but for rare
ties (tests/rewards/test_pixels.py). The order is that of Pillow 13: see `vertical_first`. Pillow up to 12 always began
with the columns; there, tall pictures come out up to 5 levels different.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def check_images(images: Tensor, prompts: Sequence[object]) -> None:
    """Raises ValueError unless images are uint8 (B, 3, H, W) with one prompt each."""
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8 (B, 3, H, W): found {images.dtype} {tuple(images.shape)}")
    if len(images) != len(prompts):
        raise ValueError(f"found {len(images)} images for {len(prompts)} prompts, expected one prompt per image")


def resize(images: Tensor, height: int, width: int, mode: str = "bicubic") -> Tensor:
    """(B, 3, H, W) levels 0 to 255 of any dtype -> fp32 whole levels (B, 3, height, width), as Pillow resizes."""
    values, old = images.float(), images.shape[-2:]
    between = (height, old[1]) if vertical_first(old, (height, width)) else (old[0], width)
    for shape in (between, (height, width)):
        if values.shape[-2:] != shape:
            values = F.interpolate(values, shape, mode=mode, antialias=True, align_corners=False)
            values = values.add_(0.5).floor_().clamp_(0, 255)  # a half goes up, as in Pillow
    return values


def vertical_first(old: Sequence[int], new: Sequence[int]) -> bool:
    """Whether Pillow 13 goes from (height, width) `old` to `new` rows first: where more than twice as many rows go as
    columns.

    Found by trying 1261 random sizes, half of them around the limit; the reason is in Pillow's pull request 9549.
    """
    return old[0] - new[0] > max(0, 2 * (old[1] - new[1]))


def resize_shortest(images: Tensor, size: int) -> Tensor:
    """Bicubic, so that the shorter side is `size` and the longer one in proportion, rounded down."""
    height, width = images.shape[-2:]
    short = min(height, width)
    return resize(images, size * height // short, size * width // short)


def centre_crop(images: Tensor, size: int, half_up: bool = False) -> Tensor:
    """The middle `size` x `size`.

    Args:
        half_up: where the margin is odd, transformers begins at the floor of its half (False), torchvision at
            Python's `round` of it, which is a pixel later for every second odd margin (True).
    """
    margins = (images.shape[-2] - size, images.shape[-1] - size)
    top, left = (round(margin / 2) if half_up else margin // 2 for margin in margins)
    return images[..., top : top + size, left : left + size]


def normalise(images: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """Levels 0 to 255 -> fp32 with a mean and standard deviation per channel, stated for values 0 to 1."""
    shape = (3, 1, 1)
    middle = torch.tensor(mean, device=images.device).view(shape)
    return (images.float() / 255 - middle) / torch.tensor(std, device=images.device).view(shape)


def clip_pixels(images: Tensor, size: int, half_up: bool = False) -> Tensor:
    """uint8 (B, 3, H, W) -> normalised fp32 (B, 3, size, size): shorter side resized, middle cropped."""
    return normalise(centre_crop(resize_shortest(images, size), size, half_up))


def flow_grpo_pixels(images: Tensor, size: int) -> Tensor:
    """uint8 (B, 3, H, W) -> normalised fp32 (B, 3, size, size) as Flow-GRPO's CLIPScore has it: shorter side resized
    bilinearly without rounding to levels, middle cropped at torchvision's margins.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    shape = (size * height // short, size * width // short)
    values = images.float()
    if short != size:
        values = F.interpolate(values, shape, mode="bilinear", antialias=True, align_corners=False)
    return normalise(centre_crop(values, size, half_up=True))


def letterbox_pixels(images: Tensor, size: int) -> Tensor:
    """uint8 (B, 3, H, W) -> normalised fp32 (B, 3, size, size): longer side resized, black margins.

    Unlike the rest it resizes without rounding to levels, as HPSv2 does (to a tensor first, then resized).
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    shape = (round(height * scale), round(width * scale))
    values = images.float()
    if scale != 1:
        values = F.interpolate(values, shape, mode="bicubic", antialias=True, align_corners=False)
    high, wide = size - shape[0], size - shape[1]
    return normalise(F.pad(values, (wide // 2, wide - wide // 2, high // 2, high - high // 2)))


def grey_out(image: Tensor, mask: Tensor, level: int = 153) -> Tensor:
    """uint8 (3, H, W) with everything outside the bool mask (H, W) at one grey level (#999 by default)."""
    return torch.where(mask, image, torch.full_like(image, level))


def qwen_size(height: int, width: int, pixels: int, factor: int) -> tuple[int, int]:
    """The multiple-of-`factor` size nearest to an image's own, then scaled to about `pixels` in all.

    This is Qwen2-VL's rule with min_pixels = max_pixels: too large rounds down, too small rounds up.
    """
    rows, columns = (max(factor, round(side / factor) * factor) for side in (height, width))
    if rows * columns == pixels:
        return rows, columns
    if rows * columns > pixels:
        shrink = math.sqrt(height * width / pixels)  # the order of operations decides where floor falls
        return math.floor(height / shrink / factor) * factor, math.floor(width / shrink / factor) * factor
    grow = math.sqrt(pixels / (height * width))
    return math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
