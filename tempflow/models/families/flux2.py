"""FLUX.2: dev (Mistral, embedded guidance) and klein (Qwen3; the base model with classifier-free guidance).

Latents are packed and normalised channel by channel. Texts are padded by the tokenizer to `model.text_tokens` and the
transformer attends to the padding, as in the pipelines: it needs no mask.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor

from tempflow.models.families.family import Family
from tempflow.settings.fields import ModelConfig, SampleConfig


class Flux2(Family):
    """FLUX.2-dev."""

    pipeline_class = Flux2Pipeline
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "attn.to_qkv_mlp_proj", "attn.to_out",
    )  # fmt: skip
    """Attention projections of the double blocks, and the single blocks' two, which hold their feed-forwards too."""
    classifier_free = False

    def __init__(self, pipeline: DiffusionPipeline, model: ModelConfig, sample: SampleConfig, device: torch.device):
        super().__init__(pipeline, model, sample, device)
        self.image_ids = pipeline._prepare_latent_ids(torch.empty(1, 1, *self.grid))[0].to(device)
        self.text_ids = pipeline._prepare_text_ids(torch.empty(1, model.text_tokens, 1))[0].to(device)

    def timestep_arguments(self, num_steps: int) -> dict[str, Any]:
        rows, columns = self.grid
        return {**super().timestep_arguments(num_steps), "mu": compute_empirical_mu(rows * columns, num_steps)}

    def encode(self, text: str) -> dict[str, Tensor]:
        embeds, _ = self.pipeline.encode_prompt(text, device=self.device, max_sequence_length=self.text_tokens)
        return {"embeds": embeds}

    def network_inputs(self, latents: Tensor, sigma: Tensor, text: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            "hidden_states": latents,
            "timestep": self.timestep(sigma) / 1000,
            "encoder_hidden_states": text["embeds"],
            "img_ids": self.image_ids,
            "txt_ids": self.text_ids,
            "guidance": torch.full_like(sigma, self.guidance),
        }

    def spatial(self, latents: Tensor) -> Tensor:
        vae, (rows, columns) = self.pipeline.vae, self.grid
        mean = vae.bn.running_mean.float()
        std = torch.sqrt(vae.bn.running_var.float() + vae.config.batch_norm_eps)
        patches = (latents * std + mean).transpose(1, 2).unflatten(2, (rows, columns))
        return self.pipeline._unpatchify_latents(patches)


class Flux2Klein(Flux2):
    """FLUX.2-klein, base or distilled."""

    pipeline_class = Flux2KleinPipeline

    @property
    def distilled(self) -> bool:
        return self.pipeline.config.is_distilled

    @property
    def classifier_free(self) -> bool:
        return self.guidance > 1

    def network_inputs(self, latents: Tensor, sigma: Tensor, text: dict[str, Tensor]) -> dict[str, Any]:
        return {**super().network_inputs(latents, sigma, text), "guidance": None}
