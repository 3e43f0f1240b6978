"""Z-Image: spatial latents, one stream of image and text tokens, a network that runs from data to noise.

Conventions of the pipeline: the network's time is 1 - sigma and its output is data - noise, hence the sign here;
guidance is `cond + g (cond - uncond)`, so that 0 means none. Its options cfg_normalization and cfg_truncation are off
by default and not offered.

Texts are padded to `model.text_tokens` and masked; `z_image_rows.py` says how the transformer takes them.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from diffusers import DiffusionPipeline, ZImagePipeline
from torch import Tensor
from torch.nn import functional as F

from tempflow.common.errors import BadInput
from tempflow.models.families.family import Family
from tempflow.models.families.z_image_rows import SEQ_MULTI_OF, forward_rows, round_up
from tempflow.settings.fields import ModelConfig, SampleConfig


class ZImage(Family):
    pipeline_class = ZImagePipeline
    lora_targets = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
    padded_text = True
    default_pixels = 1024

    def __init__(self, pipeline: DiffusionPipeline, model: ModelConfig, sample: SampleConfig, device: torch.device):
        super().__init__(pipeline, model, sample, device)
        if round_up(model.text_tokens) + 2 > pipeline.transformer.axes_lens[0]:
            limit = pipeline.transformer.axes_lens[0] - SEQ_MULTI_OF - 2
            raise BadInput("model.text_tokens", model.text_tokens, f"this model has positions for at most {limit}")
        pipeline.transformer.forward = types.MethodType(forward_rows, pipeline.transformer)

    @property
    def max_pixels(self) -> int:
        return self.pixel_multiple * min(self.pipeline.transformer.axes_lens[1:])

    @property
    def latent_shape(self) -> tuple[int, ...]:
        scale = self.pipeline.vae_scale_factor
        return self.pipeline.transformer.in_channels, self.height // scale, self.width // scale

    @property
    def classifier_free(self) -> bool:
        return self.guidance > 0

    def encode(self, text: str) -> dict[str, Tensor]:
        (embeds,), _ = self.pipeline.encode_prompt(
            [text], device=self.device, do_classifier_free_guidance=False, max_sequence_length=self.text_tokens
        )
        length = round_up(self.text_tokens)
        mask = torch.arange(length, device=embeds.device) < len(embeds)
        return {"embeds": F.pad(embeds, (0, 0, 0, length - len(embeds)))[None], "mask": mask[None]}

    def network_inputs(self, latents: Tensor, sigma: Tensor, text: dict[str, Tensor]) -> dict[str, Any]:
        time = (1000 - self.timestep(sigma)) / 1000
        return {"latents": latents, "time": time, "text": text["embeds"], "is_text": text["mask"]}

    def velocity(self, output: Tensor) -> Tensor:
        return -output

    def guide(self, uncond: Tensor, cond: Tensor) -> Tensor:
        return cond + self.guidance * (cond - uncond)

    def spatial(self, latents: Tensor) -> Tensor:
        return latents
