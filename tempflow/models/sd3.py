"""Stable Diffusion 3 and 3.5: joint-attention transformer on (C, H, W) latents, classifier-free guidance."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor, nn

from tempflow.errors import BadInput
from tempflow.models.network import DTYPES, TrainedNetwork
from tempflow.paths import resolve
from tempflow.policy import Conditioning
from tempflow.settings import ModelConfig, SampleConfig

LORA_TARGETS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
)  # fmt: skip
"""As the released TempFlow-GRPO code: attention projections of both streams."""


class SD3Policy:
    """A `StableDiffusion3Pipeline` whose transformer is trained (see `tempflow.policy.Policy`)."""

    def __init__(
        self,
        pipeline: StableDiffusion3Pipeline,
        model: ModelConfig,
        sample: SampleConfig,
        device: torch.device,
        keep_reference: bool,
    ):
        self.pipeline, self.device, self.guidance = pipeline.to(device), device, sample.guidance
        pipeline.set_progress_bar_config(disable=True)
        for part in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
            if part is not None:
                part.requires_grad_(False).eval()
        self.network = TrainedNetwork(pipeline.transformer, model, LORA_TARGETS, keep_reference)
        height, width = self._image_size(sample)
        scale = pipeline.vae_scale_factor
        self.latent_shape = (pipeline.transformer.config.in_channels, height // scale, width // scale)
        self.image_shape = (3, height, width)
        self.network_rows = 2 if self.guidance > 1 else 1

    @classmethod
    def load(
        cls, model: ModelConfig, sample: SampleConfig, device: torch.device, keep_reference: bool = True
    ) -> SD3Policy:
        folder = resolve(model.path)
        source = str(folder) if folder.exists() else model.path
        try:
            index = StableDiffusion3Pipeline.load_config(source)
            absent = {name: None for name, value in index.items() if isinstance(value, list) and value[0] is None}
            pipeline = StableDiffusion3Pipeline.from_pretrained(source, dtype=DTYPES[model.dtype], **absent)
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise BadInput("model.path", model.path, f"the pipeline does not load ({reason})") from error
        return cls(pipeline, model, sample, device, keep_reference)

    def _image_size(self, sample: SampleConfig) -> tuple[int, int]:
        default = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        multiple = self.pipeline.vae_scale_factor * self.pipeline.patch_size
        largest = multiple * self.pipeline.transformer.config.pos_embed_max_size
        sizes = (sample.height or default, sample.width or default)
        for field, size in zip(("sample.height", "sample.width"), sizes, strict=True):
            if size % multiple:
                raise BadInput(field, size, f"this model takes multiples of {multiple} pixels")
            if size > largest:
                raise BadInput(field, size, f"this model has positions for at most {largest} pixels")
        return sizes

    def sigmas(self, num_steps: int) -> Tensor:
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        config, (_, height, width) = scheduler.config, self.latent_shape
        shift = {}
        if config.get("use_dynamic_shifting"):
            tokens = height * width // self.pipeline.patch_size**2
            names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
            shift = {"mu": calculate_shift(tokens, *(config[name] for name in names))}
        scheduler.set_timesteps(num_steps, **shift)
        return scheduler.sigmas.double()

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditioning:
        embeds, negative, pooled, negative_pooled = self.pipeline.encode_prompt(
            list(texts),
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=self.network_rows == 2,
            max_sequence_length=self.network.config.text_tokens,
        )
        tensors = {"embeds": embeds, "pooled": pooled}
        if self.network_rows == 2:
            tensors |= {"uncond_embeds": negative, "uncond_pooled": negative_pooled}
        return Conditioning(tensors)

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        parts = conditioning.tensors
        if self.network_rows == 1:
            return self._network(latents, sigma, parts["embeds"], parts["pooled"])
        both = self._network(
            torch.cat((latents, latents)),
            torch.cat((sigma, sigma)),
            torch.cat((parts["uncond_embeds"], parts["embeds"])),
            torch.cat((parts["uncond_pooled"], parts["pooled"])),
        )
        uncond, cond = both.chunk(2)
        return uncond + self.guidance * (cond - uncond)

    def _network(self, latents: Tensor, sigma: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
        return self.network.forward(
            hidden_states=latents.to(embeds.dtype),
            timestep=sigma * self.pipeline.scheduler.config.num_train_timesteps,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
        ).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        scaled = (latents / vae.config.scaling_factor) + vae.config.shift_factor
        images = vae.decode(scaled.to(vae.dtype), return_dict=False)[0].float()
        return (images / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)

    def trainable(self) -> dict[str, nn.Parameter]:
        return self.network.trainable()

    def reference(self) -> AbstractContextManager[None]:
        return self.network.reference()

    def save(self, folder: Path) -> None:
        """`pytorch_lora_weights.safetensors` for `load_lora_weights`, or the whole transformer in `transformer/`."""
        if self.network.config.train == "full":
            self.pipeline.transformer.save_pretrained(folder / "transformer")
            return
        weights, metadata = self.network.adapter_state()
        self.pipeline.save_lora_weights(
            folder, transformer_lora_layers=weights, transformer_lora_adapter_metadata=metadata
        )
