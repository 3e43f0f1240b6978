"""A scorer of your own: how blue a picture is. Any callable (images, prompts) -> numbers will do."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def blueness(images: Tensor, prompts: Sequence) -> Tensor:
    """(B, 3, H, W) uint8 images and B prompts, each with .text and .metadata -> (B,) scores."""
    red, green, blue = images.float().mean((2, 3)).unbind(1)
    return (blue - (red + green) / 2) / 255
