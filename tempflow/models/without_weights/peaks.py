"""A model's network and decoder rehearsed on `meta` tensors, at the sizes a run would use."""

from __future__ import annotations

import torch
from torch import Tensor

from tempflow.models.families.z_image_rows import round_up
from tempflow.models.loading import dtypes
from tempflow.models.without_weights.rehearsal import META, Peak, enable_checkpointing, give_precision, rehearse
from tempflow.models.without_weights.skeleton import Skeleton
from tempflow.settings.fields import ModelConfig


class DryModel:
    """Peaks of memory by the number of rows. The skeleton's network has the adapters of the real one.

    Args:
        gathered: calls find trained parameters in the network's precision, as they are gathered from shares.
    """

    def __init__(self, skeleton: Skeleton, model: ModelConfig, gathered: bool = False):
        self.skeleton, self.family, self.dtypes = skeleton, skeleton._family, dtypes(model, META)
        self.module, self.vae = self.family.pipeline.transformer, self.family.pipeline.vae
        give_precision(self.module, self.dtypes["transformer"], trained=gathered)
        give_precision(self.vae, self.dtypes["vae"])
        self.trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def learning(self, rows: int, checkpointing: bool) -> Peak:
        """One training call of `rows` forks and its backward pass, beside gradients that are there already."""
        if checkpointing:
            enable_checkpointing(self.module, self.dtypes["transformer"])
        else:
            self.module.disable_gradient_checkpointing()
        for parameter in self.trained:
            parameter.grad = torch.empty_like(parameter)
        try:
            return self._network(rows, backward=True)
        finally:
            for parameter in self.trained:
                parameter.grad = None

    def sampling(self, rows: int, merged: bool = False) -> Peak:
        """One call for `rows` branches, with adapters or by the merged copy: without them, in bf16 without autocast."""
        if not merged:
            return self._network(rows, backward=False)
        adapted = bool(getattr(self.module, "peft_config", None))
        dtype = self.dtypes["transformer"]
        if adapted:
            self.module.disable_adapters()
        try:
            return self._network(rows, False, torch.float32 if dtype == torch.bfloat16 and adapted else dtype)
        finally:
            if adapted:
                self.module.enable_adapters()

    def decoding(self, rows: int) -> Peak:
        """Decoding of `rows` latents; one at a time if the decoder is sliced."""
        latents = torch.empty(rows, *self.skeleton.latent_shape, device=META)
        sliced = getattr(self.vae, "use_slicing", False)
        present = [*self.vae.parameters(), *self.vae.buffers(), latents]
        return rehearse(
            lambda: self.family.decode(latents[:1] if sliced else latents).float(), torch.float32, False, present
        )

    def _network(self, rows: int, backward: bool, autocast: torch.dtype | None = None) -> Peak:
        rows *= self.skeleton.network_rows
        dtype = self.dtypes["transformer"]
        latents = torch.empty(rows, *self.skeleton.latent_shape, device=META, dtype=dtype)
        text = self._text(rows, dtype)
        inputs = self.family.network_inputs(latents, torch.ones(rows, device=META), text)
        inputs = {name: value.to(META) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        gradients = [parameter.grad for parameter in self.trained if parameter.grad is not None]
        present = [*self.module.parameters(), *self.module.buffers(), *gradients, latents, *text.values()]
        call = lambda: self.module(**inputs, return_dict=False)[0].float()  # noqa: E731
        return rehearse(call, autocast or dtype, backward, present)

    @property
    def _clip_tokens(self) -> bool:
        """Whether the text sequence begins with that of CLIP, as in SD3, the family with a third encoder."""
        return "text_encoder_3" in self.family.pipeline.components

    def _text(self, rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Text rows of the shapes that the families encode."""
        config, tokens = self.module.config, self.family.text_tokens
        if "cap_feat_dim" in config:
            width, length = config.cap_feat_dim, round_up(tokens)
        else:
            clip = self.family.pipeline.tokenizer_max_length if self._clip_tokens else 0
            width, length = config.joint_attention_dim, tokens + clip
        text = {
            "embeds": torch.empty(rows, length, width, device=META, dtype=dtype),
            "mask": torch.ones(rows, length, dtype=torch.bool, device=META),
        }
        if "pooled_projection_dim" in config:
            text["pooled"] = torch.empty(rows, config.pooled_projection_dim, device=META, dtype=dtype)
        return text
