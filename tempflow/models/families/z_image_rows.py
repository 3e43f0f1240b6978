"""The layers of a Z-Image transformer on rows of one shape.

Its own `forward` takes lists of texts of several lengths; the shapes within depend on the longest text of the batch,
and reading the lengths stops the GPU. Here every row has one length, a multiple of 32: a text's own tokens and their
rounding up to 32, which the network attends to, are what they are there, and nothing attends to the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from torch import Tensor, nn

PATCH = 2
"""Latent pixels on one side of an image token."""


def round_up(count: Any) -> Any:
    """To a whole number of the transformer's 32-token groups."""
    return (count + SEQ_MULTI_OF - 1) // SEQ_MULTI_OF * SEQ_MULTI_OF


def forward_rows(
    self: ZImageTransformer2DModel, latents: Tensor, time: Tensor, text: Tensor, is_text: Tensor, return_dict: bool
) -> tuple[Tensor]:
    """`ZImageTransformer2DModel.forward` for rows of one shape.

    latents (R, C, h, w), time (R,), text (R, L, E) with L a multiple of 32, is_text (R, L) bool -> ((R, C, h, w),).
    """

    def run(block: nn.Module, *arguments: Tensor | None) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *arguments)
        return block(*arguments)

    rows, channels, height, width = latents.shape
    count, grid, name = height * width // PATCH**2, (height // PATCH, width // PATCH), f"{PATCH}-1"
    time_embedding = self.t_embedder(time * self.t_scale).type_as(latents)
    kept = round_up(is_text.sum(1))  # the text's own tokens and their rounding, which is attended to

    patches = latents.view(rows, channels, grid[0], PATCH, grid[1], PATCH).permute(0, 2, 4, 3, 5, 1).flatten(3)
    image = self.all_x_embedder[name](patches.flatten(1, 2))
    padding = self.x_pad_token.to(image.dtype).expand(rows, round_up(count) - count, -1)
    image = torch.cat((image, padding), 1)
    image_rope, text_rope = rope_of_rows(self, kept, grid, image.shape[1], text.shape[1])
    for block in self.noise_refiner:
        image = run(block, image, None, image_rope, time_embedding)

    text = self.cap_embedder(text)
    text = torch.where(is_text[..., None], text, self.cap_pad_token.to(text.dtype))
    attended = torch.arange(text.shape[1], device=text.device) < kept[:, None]
    for block in self.context_refiner:
        text = run(block, text, attended, text_rope)

    both, rope = torch.cat((image, text), 1), torch.cat((image_rope, text_rope), 1)
    attended = torch.cat((attended.new_ones(rows, image.shape[1]), attended), 1)
    for block in self.layers:
        both = run(block, both, attended, rope, time_embedding)
    output = self.all_final_layer[name](both, c=time_embedding)[:, :count]
    output = output.view(rows, *grid, PATCH, PATCH, channels).permute(0, 5, 1, 3, 2, 4)
    return (output.reshape(latents.shape),)


def rope_of_rows(
    transformer: ZImageTransformer2DModel, kept: Tensor, grid: tuple[int, int], image_length: int, text_length: int
) -> tuple[Tensor, Tensor]:
    """Rotations of image tokens (R, image_length, .) and text tokens (R, text_length, .), complex.

    Positions are (frame, row, column): text counts frames from 1, the image stands in the frame after the text's
    `kept` (R,) tokens, and the tokens that fill it up stand at 0.
    """
    device, rows = kept.device, len(kept)
    text_ids = torch.zeros(rows, text_length, 3, dtype=torch.int64, device=device)
    text_ids[..., 0] = torch.arange(1, text_length + 1, device=device)
    image_ids = torch.zeros(rows, image_length, 3, dtype=torch.int64, device=device)
    count = grid[0] * grid[1]
    place = torch.arange(count, device=device)
    image_ids[:, :count, 0] = kept[:, None] + 1
    image_ids[:, :count, 1] = place // grid[1]
    image_ids[:, :count, 2] = place % grid[1]
    embed = transformer.rope_embedder
    return tuple(embed(ids.flatten(0, 1)).unflatten(0, ids.shape[:2]) for ids in (image_ids, text_ids))
