"""PickScore's architecture (CLIP-H/14 of laion, published configuration) with random weights, as a reward.

Two ways of the same network: `ByImages` takes PIL images through CLIP's own image processor and runs the text tower for
every image, as the released code does; `ByTensor` takes bytes on the device, resizes them there and runs the text tower
once per prompt. Tokens are random numbers: a tokenizer's files are not part of the architecture.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from rollouts.architectures import default_dtype
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from tempflow.prompts import Prompt

CLIP_H = {
    "projection_dim": 1024,
    "text_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
                    "hidden_act": "gelu", "projection_dim": 1024},
    "vision_config": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
                      "num_attention_heads": 16, "hidden_act": "gelu", "patch_size": 14, "image_size": 224,
                      "projection_dim": 1024},
}  # fmt: skip
SMALL_TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL_CLIP = {
    "projection_dim": 16,
    "text_config": CLIP_H["text_config"] | SMALL_TOWER | {"projection_dim": 16},
    "vision_config": CLIP_H["vision_config"] | SMALL_TOWER | {"projection_dim": 16},
}
TOKENS, SIDE = 77, 224
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def make_clip(config: dict, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """CLIP with random weights; the same ones in every precision, up to rounding."""
    torch.manual_seed(1)
    with default_dtype(torch.float32), torch.device(device):
        model = CLIPModel(CLIPConfig(**config))
    return model.to(dtype).eval().requires_grad_(False)


class _Clip:
    def __init__(self, model: nn.Module):
        self.model = model
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    def image_features(self, pixels: Tensor) -> Tensor:
        pooled = self.model.vision_model(pixel_values=pixels.to(self.device, self.dtype)).pooler_output
        return functional.normalize(self.model.visual_projection(pooled), dim=-1)

    def text_features(self, prompts: Sequence[Prompt]) -> Tensor:
        vocabulary = self.model.config.text_config.vocab_size
        tokens = [torch.randint(vocabulary, (TOKENS,), generator=torch.Generator().manual_seed(sum(text.encode())))
                  for text in (prompt.text for prompt in prompts)]  # fmt: skip
        pooled = self.model.text_model(input_ids=torch.stack(tokens).to(self.device)).pooler_output
        return functional.normalize(self.model.text_projection(pooled), dim=-1)

    def score(self, text: Tensor, image: Tensor) -> Tensor:
        return (self.model.logit_scale.exp() * (text * image).sum(1)).float() / 26


class ByImages(_Clip):
    """PIL images, resized and normalised on the CPU; both towers for every image."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.processor = CLIPImageProcessor()

    @torch.no_grad()
    def __call__(self, images: list[Image.Image], prompts: Sequence[Prompt]) -> Tensor:
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
        return self.score(self.text_features(prompts), self.image_features(pixels))


class ByTensor(_Clip):
    """Bytes (B, 3, H, W), resized and normalised on the device; texts encoded once."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.texts: dict[str, Tensor] = {}
        self.mean, self.std = (torch.tensor(values, device=self.device).view(3, 1, 1) for values in (MEAN, STD))

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        for prompt in prompts:
            if prompt.text not in self.texts:
                self.texts[prompt.text] = self.text_features([prompt])[0]
        text = torch.stack([self.texts[prompt.text] for prompt in prompts])
        pixels = images.to(self.device, non_blocking=True).float()
        pixels = functional.interpolate(pixels, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 255)
        return self.score(text, self.image_features((pixels / 255 - self.mean) / self.std))
