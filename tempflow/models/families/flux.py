"""FLUX.1 (dev, schnell): packed latents, CLIP and T5, guidance embedded in the network's input."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline, FluxPipeline
from torch import Tensor

from tempflow.models.families.family import Family
from tempflow.settings.fields import ModelConfig, SampleConfig


class Flux(Family):
    pipeline_class = FluxPipeline
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    )  # fmt: skip
    """As the released TempFlow-GRPO code: attention projections, and the feed-forwards of the double blocks."""
    classifier_free = False

    def __init__(self, pipeline: DiffusionPipeline, model: ModelConfig, sample: SampleConfig, device: torch.device):
        super().__init__(pipeline, model, sample, device)
        self.image_ids = pipeline._prepare_latent_image_ids(1, *self.grid, device, torch.float32)
        self.text_ids = torch.zeros(model.text_tokens, 3, device=device)

    @property
    def distilled(self) -> bool:
        return not self.pipeline.transformer.config.guidance_embeds

    def encode(self, text: str) -> dict[str, Tensor]:
        embeds, pooled, _ = self.pipeline.encode_prompt(text, device=self.device, max_sequence_length=self.text_tokens)
        return {"embeds": embeds, "pooled": pooled}

    def network_inputs(self, latents: Tensor, sigma: Tensor, text: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = {
            "hidden_states": latents,
            "timestep": self.timestep(sigma) / 1000,
            "encoder_hidden_states": text["embeds"],
            "pooled_projections": text["pooled"],
            "img_ids": self.image_ids,
            "txt_ids": self.text_ids,
        }
        return inputs if self.distilled else {**inputs, "guidance": torch.full_like(sigma, self.guidance)}

    def spatial(self, latents: Tensor) -> Tensor:
        return self.pipeline._unpack_latents(latents, self.height, self.width, self.pipeline.vae_scale_factor)
