"""CLIPScore: the cosine of picture and prompt in CLIP ViT-L/14.

Score: exp(logit_scale) cos / 30, that is 100 cos / 30, the scaling of Flow-GRPO, about 0.5 to 1.2. (The metric of
arXiv 2104.08718 is 2.5 max(cos, 0) of ViT-B/32 with a prefix; multiply as you need, groups are normalised anyway.)

How pictures come to the 224 pixels of the network is the option `resize`:

* official (default), as CLIP was trained and as its processor does: bicubic, rounded to levels.
* flow_grpo, as Flow-GRPO's scorer (flow_grpo/clip_scorer.py) does: bilinear with antialiasing, not rounded. At 512
  pixels the two were found .08 apart. One difference stays: theirs sees the decoder's values before they are rounded to
  256 levels, every scorer here sees levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tempflow.prompts import Prompt
from tempflow.rewards.parts.clip_model import load_clip
from tempflow.rewards.parts.pixels import check_images, clip_pixels, flow_grpo_pixels
from tempflow.rewards.parts.weights import one_of

DIVISOR = 30.0
RESIZES = {"official": clip_pixels, "flow_grpo": flow_grpo_pixels}


class ClipScore:
    """Agreement of picture and prompt."""

    def __init__(
        self,
        path: str | Path = "openai/clip-vit-large-patch14",
        resize: str = "official",
        dtype: str | None = None,
        device: Any = "cpu",
    ) -> None:
        """
        Args:
            path: folder or hub id of a CLIP of transformers with its tokenizer.
            resize: official or flow_grpo.
            dtype: fp32, bf16 or fp16; None takes bf16 on a GPU, fp32 on a CPU.
        """
        pixels = one_of("clipscore", "resize", resize, RESIZES)
        self.clip = load_clip("clipscore", "path", path, dtype, device)
        self.clip.pixels = pixels

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """uint8 (B, 3, H, W) and B prompts -> fp32 (B,)."""
        check_images(images, prompts)
        return self.clip.cosine(images, [prompt.text for prompt in prompts]) * (self.clip.scale / DIVISOR)
