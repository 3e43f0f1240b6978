"""Qwen-Image: packed latents, a language model as text encoder, true classifier-free guidance renormalised per token.

A text's row is padded to `model.text_tokens` and masked: its tokens stand where they would stand without padding, and
nothing attends to the rest, so the image tokens see the same network.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ModelMixin, QwenImagePipeline
from diffusers.models.transformers import transformer_qwenimage
from torch import Tensor
from torch.nn import functional as F

from tempflow.models.families.family import Family


def text_lengths(embeds: Tensor, mask: Tensor | None) -> tuple[int, Tensor | None, Tensor | None]:
    """diffusers' `compute_text_seq_len_from_mask` with the same results: L, each row's last token + 1, mask (R, L).

    Its own sends a number to the device at every call: the host waits, and no CUDA graph can hold the call.
    """
    length = embeds.shape[1]
    if mask is None:
        return length, None, None
    if mask.shape[:2] != embeds.shape[:2]:
        raise ValueError(f"encoder_hidden_states_mask: found {tuple(mask.shape)}, expected {tuple(embeds.shape[:2])}")
    mask = mask.bool()
    last = torch.where(mask, torch.arange(1, length + 1, device=mask.device), 0).amax(1)
    return length, torch.where(mask.any(1), last, length), mask


transformer_qwenimage.compute_text_seq_len_from_mask = text_lengths


class QwenImage(Family):
    pipeline_class = QwenImagePipeline
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    )  # fmt: skip
    max_text_tokens = 1024
    padded_text = True
    blank = " "
    """The negative prompt that the pipeline's authors use."""

    def encode(self, text: str) -> dict[str, Tensor]:
        embeds, _ = self.pipeline.encode_prompt(text, device=self.device, max_sequence_length=self.text_tokens)
        padding = self.text_tokens - embeds.shape[1]
        mask = torch.arange(self.text_tokens, device=embeds.device) < embeds.shape[1]
        return {"embeds": F.pad(embeds, (0, 0, 0, padding)), "mask": mask[None]}

    def network_inputs(self, latents: Tensor, sigma: Tensor, text: dict[str, Tensor]) -> dict[str, Any]:
        return {
            "hidden_states": latents,
            "timestep": self.timestep(sigma) / 1000,
            "encoder_hidden_states": text["embeds"],
            "encoder_hidden_states_mask": text["mask"],
            "img_shapes": [[(1, *self.grid)]] * len(latents),
        }

    def guide(self, uncond: Tensor, cond: Tensor) -> Tensor:
        """The guided velocity with each token's norm set back to that of the conditional one, as in the pipeline."""
        guided = super().guide(uncond, cond)
        return guided * (cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def spatial(self, latents: Tensor) -> Tensor:
        """(R, C, 1, h, w), for its autoencoder is one of videos."""
        unpacked = self.pipeline._unpack_latents(latents, self.height, self.width, self.pipeline.vae_scale_factor)
        mean, std = (
            torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
            for values in (self.pipeline.vae.config.latents_mean, self.pipeline.vae.config.latents_std)
        )
        return unpacked * std + mean

    def decode(self, latents: Tensor, vae: ModelMixin | None = None) -> Tensor:
        return super().decode(latents, vae)[:, :, 0]
