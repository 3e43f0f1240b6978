"""Joint attention of Stable Diffusion 3 whose kernel can be chosen.

As diffusers' `JointAttnProcessor2_0`, to the bit on its native backend, forwards and backwards. That one calls torch's
attention itself; this one asks diffusers' dispatcher (`diffusers.models.attention_dispatch`), as other families do.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import Tensor, nn


class JointAttention:
    """Image and text tokens attend to all of both; without text (the second attention of SD3.5 medium) to the image."""

    _attention_backend = None
    _parallel_config = None
    """both under the names by which diffusers sets them"""

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(R, image tokens, C) and maybe (R, text tokens, C) -> the same shapes."""
        image, text = hidden_states, encoder_hidden_states
        parts = _heads(attn, image, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k, None))
        if text is not None:
            layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            added = _heads(attn, text, layers, (attn.norm_added_q, attn.norm_added_k, None))
            parts = [torch.cat(pair, dim=2) for pair in zip(parts, added, strict=True)]
        seen = self._attend(*parts)
        if text is None:
            return _out(attn, seen)
        image, text = seen[:, : image.shape[1]], seen[:, image.shape[1] :]
        return _out(attn, image), text if attn.context_pre_only else attn.to_add_out(text)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(R, heads, L, E) each -> (R, L, heads E), computed in the values' precision, which is autocast's.

        Normalised queries and keys are wider where their norms are trained. torch's own attention rounds them so, too;
        other kernels refuse them.
        """
        parts = (part.transpose(1, 2).to(value.dtype) for part in (query, key, value))
        seen = dispatch_attention_fn(*parts, backend=self._attention_backend, parallel_config=self._parallel_config)
        return seen.flatten(2).to(query.dtype)  # as diffusers: the next product rounds it back where it must


def _heads(
    attn: Attention, tokens: Tensor, layers: tuple[nn.Module, ...], norms: tuple[nn.Module | None, ...]
) -> list[Tensor]:
    """Query, key and value (R, heads, L, E) of (R, L, C) tokens."""
    parts = [layer(tokens).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for layer in layers]
    return [part if norm is None else norm(part) for part, norm in zip(parts, norms, strict=True)]


def _out(attn: Attention, image: Tensor) -> Tensor:
    """The last projection, and dropout where there is any."""
    for layer in attn.to_out:
        image = layer(image)
    return image


def make_switchable(transformer: nn.Module) -> None:
    """Gives an SD3 transformer's attention layers this processor in place of diffusers' plain one."""
    for part in transformer.modules():
        if isinstance(part, Attention) and type(part.processor) is JointAttnProcessor2_0:
            part.set_processor(JointAttention())
