"""Finished latents to images in main memory, chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tempflow.common.errors import Halted
from tempflow.common.tensors import chunks
from tempflow.policy import ImageDecoder


class FullCalls:
    """A decoder that is called with exactly `rows` latents: fewer are filled up, and what came of the rest is cut off.

    For a compiled one, which would be compiled again for every other number. Rows are independent of one another.
    """

    def __init__(self, decoder: ImageDecoder, rows: int):
        self.decoder, self.rows, self.device = decoder, rows, decoder.device
        self.latent_shape, self.image_shape = decoder.latent_shape, decoder.image_shape
        self.finite: Tensor | None = None

    def decode(self, latents: Tensor) -> Tensor:
        """(R, D...) with R <= rows -> uint8 images (R, 3, H, W)."""
        missing = self.rows - len(latents)
        filled = torch.cat((latents, latents[-1:].expand(missing, *latents.shape[1:]))) if missing else latents
        images = self.decoder.decode(filled)[: len(latents)]
        finite = getattr(self.decoder, "finite", None)
        self.finite = None if finite is None else finite[: len(latents)]
        return images


def even_rows(total: int, most: int) -> int:
    """Rows of the fewest calls of at most `most` that `total` rows take, each as large as the others.

    Example: 24 rows, at most 16 a call: two calls of 12.
    """
    calls = -(-total // most)
    return -(-total // calls)


@dataclass(frozen=True)
class Decoded:
    """Images, and which of them are none, since NaN or infinity came up on the way. Such a one looks black."""

    images: Tensor
    """(..., 3, H, W) uint8 on the CPU"""
    lost_latents: Tensor
    """(...,) bool: its latents were not finite, which is the transformer's doing"""
    lost_images: Tensor
    """(...,) bool: its latents were, and the image was not, which is the decoder's"""

    @property
    def lost(self) -> Tensor:
        """(...,) bool"""
        return self.lost_latents | self.lost_images

    def counts(self) -> Tensor:
        """(3,) int64: lost latents, lost images, all."""
        return torch.tensor([int(self.lost_latents.sum()), int(self.lost_images.sum()), self.lost_latents.numel()])


@torch.no_grad()
def decode_branches(decoder: ImageDecoder, latents: Tensor, rows: int) -> Decoded:
    """(..., D...) finished latents to images, `rows` a call."""
    flat = latents.view(-1, *decoder.latent_shape)
    images = torch.empty(len(flat), *decoder.image_shape, dtype=torch.uint8)
    sound = torch.ones(2, len(flat), dtype=torch.bool)
    for part in chunks(len(flat), rows):
        images[part] = decoder.decode(flat[part]).cpu()
        sound[0, part] = flat[part].isfinite().flatten(1).all(1).cpu()
        finite = getattr(decoder, "finite", None)
        sound[1, part] = sound[0, part] if finite is None else finite.cpu()
    leading = latents.shape[: latents.dim() - len(decoder.latent_shape)]
    lost_latents, lost_images = ~sound[0], sound[0] & ~sound[1]
    return Decoded(images.view(*leading, *decoder.image_shape), lost_latents.view(leading), lost_images.view(leading))


def check_lost(counts: Tensor, when: str, strict: bool) -> dict[str, int]:
    """How many of all processes' images are lost, as figures of a row of the metrics; nothing where none is.

    Args:
        counts: (ranks, 3) of `Decoded.counts`.
        strict: no image may be lost, since a sound model loses none; else not all.
    Raises:
        Halted: too many are, with the part that is to blame, on all ranks alike.
    """
    latents, images, total = counts.sum(0).tolist()
    lost = latents + images
    if lost and (strict or lost == total):
        where, count = ("transformer", latents) if latents else ("decoder (VAE)", images)
        setting = "model.dtype" if latents else "model.vae_dtype"
        hint = f"{count} of {total} images {when} come out of the {where} as NaN or infinity; look at its weights"
        raise Halted(setting, "nonfinite", f"{hint}, or set {setting} to bf16 or fp32")
    return {"nonfinite_latents": latents, "nonfinite_images": images} if lost else {}
