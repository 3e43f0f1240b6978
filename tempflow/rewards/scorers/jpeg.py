"""How small, or how large, the picture is as a JPEG: rewards that need no network (DDPO, arXiv 2305.13301).

Score: the kilobytes (1000 bytes) at quality 95, over 500, negative for compressibility. Flow-GRPO's compressibility is
the same; its incompressibility is the bare kilobytes, 500 times ours, which matters only in a weighted sum of rewards.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from tempflow.prompts import Prompt
from tempflow.rewards.parts.pixels import check_images

QUALITY, UNIT = 95, 500_000


def jpeg_bytes(image: Tensor) -> int:
    """Length of a uint8 (3, H, W) image as a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(file, format="JPEG", quality=QUALITY)
    return file.tell()


def incompressibility(images: Tensor, prompts: Sequence[Prompt]) -> list[float]:
    """uint8 (B, 3, H, W) -> B sizes in units of 500 kB."""
    check_images(images, prompts)
    return [jpeg_bytes(image) / UNIT for image in images]


def compressibility(images: Tensor, prompts: Sequence[Prompt]) -> list[float]:
    """uint8 (B, 3, H, W) -> B negative sizes in units of 500 kB."""
    return [-size for size in incompressibility(images, prompts)]
