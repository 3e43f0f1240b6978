"""LAION's aesthetic predictor, version 2: what people would rate the picture from 1 to 10, whatever the prompt.

Score: a stack of five linear layers on the unit CLIP ViT-L/14 vector of the picture; the weights are those of
`sac+logos+ava1-l14-linearMSE.pth`, which TRL keeps on the hub under the default path.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tempflow.prompts import Prompt
from tempflow.rewards.parts.clip_model import load_clip
from tempflow.rewards.parts.pixels import check_images
from tempflow.rewards.parts.weights import frozen, install, needed, option, read_tensors

HIDDEN = (1024, 128, 64, 16)
PLACES = (0, 2, 4, 6, 7)
"""where the linear layers stand in the official stack; between the others there was dropout"""


class Head(nn.Module):
    """Linear layers one after the other, without anything in between when not training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = (width, *HIDDEN, 1)
        pairs = zip(PLACES, sizes, sizes[1:], strict=False)
        self.layers = nn.ModuleDict({str(place): nn.Linear(before, after) for place, before, after in pairs})

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, width) -> (B,)."""
        for layer in self.layers.values():
            vectors = layer(vectors)
        return vectors.squeeze(-1)


class Aesthetic:
    """LAION aesthetic score v2."""

    def __init__(
        self,
        path: str | Path = "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth",
        clip: str | Path = "openai/clip-vit-large-patch14",
        dtype: str | None = None,
        device: Any = "cpu",
    ) -> None:
        """
        Args:
            path: file of the linear layers, local or owner/repository/file of the hub.
            clip: folder or hub id of CLIP ViT-L/14.
            dtype: fp32, bf16 or fp16 of CLIP; None takes bf16 on a GPU, fp32 on a CPU. The linear layers are fp32.
        """
        tensors = read_tensors("aesthetic", "path", path)
        width = needed("aesthetic", "path", path, tensors, "layers.0.weight").shape[1]
        self.head = Head(width)
        install(self.head, tensors, option("aesthetic", "path"), path)
        frozen(self.head, torch.float32, device)
        self.clip = load_clip("aesthetic", "clip", clip, dtype, device)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """uint8 (B, 3, H, W) -> fp32 (B,); the prompts do not matter."""
        check_images(images, prompts)
        return self.head(self.clip.images(images))
