"""PickScore: how much people who saw both would prefer this picture for this prompt (arXiv 2305.01569).

Score: exp(logit_scale) cos(image, text) / 26, the scaling of Flow-GRPO, about 0.7 to 1; the paper's own score lacks
the division. A CLIP ViT-H/14 of 3.9 GB in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tempflow.prompts import Prompt
from tempflow.rewards.parts.clip_model import load_clip
from tempflow.rewards.parts.pixels import check_images

DIVISOR = 26.0


class PickScore:
    """PickScore v1."""

    def __init__(
        self,
        path: str | Path = "yuvalkirstain/PickScore_v1",
        processor: str | Path = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        dtype: str | None = None,
        device: Any = "cpu",
    ) -> None:
        """
        Args:
            path: folder or hub id of the model.
            processor: folder or hub id of its tokenizer.
            dtype: fp32, bf16 or fp16; None takes bf16 on a GPU, fp32 on a CPU.
        """
        self.clip = load_clip("pickscore", "path", path, dtype, device, processor)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """uint8 (B, 3, H, W) and B prompts -> fp32 (B,)."""
        check_images(images, prompts)
        return self.clip.cosine(images, [prompt.text for prompt in prompts]) * (self.clip.scale / DIVISOR)
