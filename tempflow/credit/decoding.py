"""Finished latents to images in main memory, chunk by chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from tempflow.common.tensors import chunks
from tempflow.policy import ImageDecoder


class FullCalls:
    """A decoder that is called with exactly `rows` latents: fewer are filled up, and what came of the rest is cut off.

    For a compiled one, which would be compiled again for every other number. Rows are independent of one another.
    """

    def __init__(self, decoder: ImageDecoder, rows: int):
        self.decoder, self.rows, self.device = decoder, rows, decoder.device
        self.latent_shape, self.image_shape = decoder.latent_shape, decoder.image_shape

    def decode(self, latents: Tensor) -> Tensor:
        """(R, D...) with R <= rows -> uint8 images (R, 3, H, W)."""
        missing = self.rows - len(latents)
        if not missing:
            return self.decoder.decode(latents)
        filled = torch.cat((latents, latents[-1:].expand(missing, *latents.shape[1:])))
        return self.decoder.decode(filled)[: len(latents)]


def even_rows(total: int, most: int) -> int:
    """Rows of the fewest calls of at most `most` that `total` rows take, each as large as the others.

    Example: 24 rows, at most 16 a call: two calls of 12.
    """
    calls = -(-total // most)
    return -(-total // calls)


@torch.no_grad()
def decode_branches(decoder: ImageDecoder, latents: Tensor, rows: int) -> Tensor:
    """(..., D...) finished latents to uint8 images (..., 3, H, W) on the CPU, `rows` a call."""
    flat = latents.view(-1, *decoder.latent_shape)
    images = torch.empty(len(flat), *decoder.image_shape, dtype=torch.uint8)
    for part in chunks(len(flat), rows):
        images[part] = decoder.decode(flat[part]).cpu()
    leading = latents.shape[: latents.dim() - len(decoder.latent_shape)]
    return images.view(*leading, *decoder.image_shape)
