"""Stable Diffusion 3 and 3.5 (medium, large): spatial latents, two CLIP encoders and T5, classifier-free guidance."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from tempflow.models.families.family import Family
from tempflow.models.families.sd3_attention import make_switchable
from tempflow.settings.fields import ModelConfig, SampleConfig


class SD3(Family):
    pipeline_class = StableDiffusion3Pipeline
    optional_parts = ("text_encoder_3", "tokenizer_3")
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    )  # fmt: skip
    """As the released TempFlow-GRPO code: attention projections of both streams."""

    def __init__(
        self, pipeline: StableDiffusion3Pipeline, model: ModelConfig, sample: SampleConfig, device: torch.device
    ):
        super().__init__(pipeline, model, sample, device)
        make_switchable(pipeline.transformer)

    @property
    def pixel_multiple(self) -> int:
        return self.pipeline.vae_scale_factor * self.pipeline.patch_size

    @property
    def max_pixels(self) -> int:
        return self.pixel_multiple * self.pipeline.transformer.config.pos_embed_max_size

    @property
    def latent_shape(self) -> tuple[int, ...]:
        scale = self.pipeline.vae_scale_factor
        return self.pipeline.transformer.config.in_channels, self.height // scale, self.width // scale

    def timestep_arguments(self, num_steps: int) -> dict[str, Any]:
        return {"mu": self.shift()}

    def encode(self, text: str) -> dict[str, Tensor]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            text,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_tokens,
        )
        return {"embeds": embeds, "pooled": pooled}

    def network_inputs(self, latents: Tensor, sigma: Tensor, text: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            "hidden_states": latents,
            "timestep": self.timestep(sigma),
            "encoder_hidden_states": text["embeds"],
            "pooled_projections": text["pooled"],
        }

    def spatial(self, latents: Tensor) -> Tensor:
        return latents
