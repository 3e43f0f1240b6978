"""CLIPScore: the cosine of picture and prompt in CLIP ViT-L/14.

Score: exp(logit_scale) cos / 30, that is 100 cos / 30, the scaling of Flow-GRPO, about 0.5 to 1.2. (The metric of
arXiv 2104.08718 is 2.5 max(cos, 0) of ViT-B/32 with a prefix; multiply as you need, groups are normalised anyway.)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tempflow.prompts import Prompt
from tempflow.rewards.parts.clip_model import load_clip
from tempflow.rewards.parts.pixels import check_images

DIVISOR = 30.0


class ClipScore:
    """Agreement of picture and prompt."""

    def __init__(
        self, path: str | Path = "openai/clip-vit-large-patch14", dtype: str = "fp32", device: Any = "cpu"
    ) -> None:
        """
        Args:
            path: folder or hub id of a CLIP of transformers with its tokenizer.
            dtype: fp32, bf16 or fp16.
        """
        self.clip = load_clip("clipscore", "path", path, dtype, device)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """uint8 (B, 3, H, W) and B prompts -> fp32 (B,)."""
        check_images(images, prompts)
        return self.clip.cosine(images, [prompt.text for prompt in prompts]) * (self.clip.scale / DIVISOR)
