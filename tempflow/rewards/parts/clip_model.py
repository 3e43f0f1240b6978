"""CLIP as scorers use it: unit vectors of images and texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from tempflow.rewards.parts.pixels import clip_pixels
from tempflow.rewards.parts.weights import dtype_of, pretrained, tokenizer_of


class ClipEncoder:
    """A CLIP model with its tokenizer; unit vectors are fp32 whatever the network computes in."""

    def __init__(self, model: nn.Module, tokenizer: Any, pixels: Callable[[Tensor, int], Tensor] = clip_pixels):
        """
        Args:
            pixels: (uint8 images (B, 3, H, W), size) -> what the network sees.
        """
        self.model, self.tokenizer, self.pixels = model, tokenizer, pixels
        self.size = model.config.vision_config.image_size
        self.length = model.config.text_config.max_position_embeddings

    def images(self, images: Tensor) -> Tensor:
        """Unit vectors (B, E) of uint8 images (B, 3, H, W)."""
        values = self.pixels(images.to(self.model.device), self.size).to(self.model.dtype)
        return unit(self.model.get_image_features(pixel_values=values).pooler_output)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (B, E) of texts, each different text computed once; too long ones are cut."""
        distinct = list(dict.fromkeys(texts))
        tokens = self.tokenizer(distinct, padding=True, truncation=True, max_length=self.length, return_tensors="pt")
        tokens = {key: tokens[key].to(self.model.device) for key in ("input_ids", "attention_mask")}
        vectors = unit(self.model.get_text_features(**tokens).pooler_output)
        return vectors[[distinct.index(text) for text in texts]]

    def cosine(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """(B,) fp32 cosines of images with their texts."""
        return (self.images(images) * self.texts(texts)).sum(-1)

    @property
    def scale(self) -> float:
        """The learnt factor between cosine and logit."""
        return self.model.logit_scale.float().exp().item()


def unit(vectors: Tensor) -> Tensor:
    """(..., E) of any precision -> fp32 of length 1."""
    return torch.nn.functional.normalize(vectors.float(), dim=-1)


def load_clip(
    scorer: str, name: str, path: str | Path, dtype: str | None, device: Any, processor: str | Path | None = None
) -> ClipEncoder:
    """A CLIP of transformers from a folder or hub id.

    Args:
        name: the option that gave `path`, for messages.
        processor: where the tokenizer is, if not with the model.
    """
    model = pretrained(CLIPModel, scorer, name, path, dtype_of(scorer, dtype, device), device)
    place, words = ("processor", processor) if processor else (name, path), model.config.text_config.vocab_size
    return ClipEncoder(model, tokenizer_of(CLIPTokenizer, scorer, *place, words))
