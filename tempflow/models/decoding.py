"""Latents to images, by a pipeline's own autoencoder or by a smaller one of the same latents.

A small one (`AutoencoderTiny`, the class of TAESD, or an `AutoencoderKL`) reads latents by its own two numbers, as a
diffusers pipeline that it is put into would: TAESD's are 1 and 0, for it knows latents as the network sees them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ModelMixin
from huggingface_hub import snapshot_download
from torch import Tensor

from tempflow.common.errors import BadInput
from tempflow.common.files import resolve
from tempflow.models.families.family import Family, check_scaling, scaling
from tempflow.models.weights.origin import Origin
from tempflow.models.weights.parts import check_finite, load_part, without_weights

FIELD = "tails.decoder"
KINDS = {kind.__name__: kind for kind in (AutoencoderTiny, AutoencoderKL)}
NO_SCALING = (1.0, 0.0)


class FamilyDecoder:
    """A `tempflow.policy.ImageDecoder` of a family's latents by one autoencoder."""

    def __init__(self, family: Family, vae: ModelMixin, device: torch.device):
        self.family, self.vae, self.device = family, vae, device
        self.latent_shape, self.image_shape = family.latent_shape, family.image_shape
        self.finite: Tensor | None = None

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        images = self.family.decode(latents, self.vae).float()
        self.finite = images.isfinite().flatten(1).all(1)  # as bytes, NaN would be black
        return (images / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)

    def prepare(self, compiled: bool) -> None:
        """Channels last on a GPU, where all convolutions are of images; compiled, for each shape by itself."""
        images_only = all(parameter.dim() <= 4 for parameter in self.vae.parameters())
        if self.device.type == "cuda" and images_only:
            self.vae.to(memory_format=torch.channels_last)
        if compiled:
            self.vae.decoder.compile(dynamic=False)


def load_light(path: str, family: Family) -> ModelMixin:
    """The autoencoder at `path`, a folder or hub id: frozen, in the own one's precision, on its device, sliced like it.

    Raises:
        BadInput: as `plan_light`, or its weights are missing, incomplete or no safetensors.
    """
    kind, own, origin = type(plan_light(path, family)), family.pipeline.vae, _origin(path)
    folder = _downloaded(path)
    vae = load_part(kind, folder, own.dtype, origin).to(own.device)
    check_finite(vae, folder, origin)
    if getattr(own, "use_slicing", False):
        vae.enable_slicing()
    if getattr(own, "use_tiling", False):
        vae.enable_tiling()
    return vae


def plan_light(path: str, family: Family) -> ModelMixin:
    """The autoencoder at `path` from its configuration alone, without storage, after seeing that it fits the family.

    Raises:
        BadInput: no such autoencoder, or other channels, another scale, another image size.
    """
    vae = _without_weights(path)
    check_scaling(vae, _origin(path))
    latents = family.spatial(torch.zeros(1, *family.latent_shape, device=family.device))
    channels, own = vae.config.latent_channels, scaling(family.pipeline.vae)
    if latents.dim() != 4:
        hint = f"reads latents of images, but this model's, {tuple(latents.shape[1:])}, are those of videos"
        raise BadInput(FIELD, path, hint)
    if latents.shape[1] != channels:
        raise BadInput(FIELD, path, f"reads latents of {channels} channels, but this model's have {latents.shape[1]}")
    if scaling(vae) not in (NO_SCALING, own):
        hint = f"its latents have the scale and shift {scaling(vae)}, neither this model's {own} nor {NO_SCALING}"
        raise BadInput(FIELD, path, hint)
    _check_size(path, vae, latents.shape, family)
    return vae


def _check_size(path: str, vae: ModelMixin, shape: torch.Size, family: Family) -> None:
    """Rehearses one call without data."""
    with torch.no_grad():
        found = tuple(vae.decode(torch.empty(shape, device="meta"), return_dict=False)[0].shape[1:])
    if found != family.image_shape:
        raise BadInput(FIELD, path, f"makes images {found}, but this model's are {tuple(family.image_shape)}")


def _without_weights(path: str) -> ModelMixin:
    origin = _origin(path)
    with origin.one_line():
        config: dict[str, Any] = AutoencoderTiny.load_config(_source(path))
    kind = KINDS.get(config.get("_class_name"))
    if kind is None:
        raise BadInput(FIELD, path, f"holds a {config.get('_class_name')}; supported are {', '.join(KINDS)}")
    with origin.one_line():
        return without_weights(kind, _source(path))


def _source(path: str) -> str:
    """The folder, where there is one, or a hub id."""
    folder = resolve(path, FIELD)
    if not folder.is_dir() and (path.count("/") != 1 or path.startswith((".", "/", "~", "tempflow:"))):
        raise BadInput(FIELD, path, "no such folder, and no hub id (owner/name)")
    return str(folder) if folder.is_dir() else path


def _downloaded(path: str) -> Path:
    """The folder; one of the hub is fetched, weights and configuration only."""
    source = _source(path)
    if source != path or Path(path).is_dir():
        return Path(source)
    with _origin(path).one_line():
        return Path(snapshot_download(path, allow_patterns=["config.json", "diffusion_pytorch_model*.safetensors*"]))


def _origin(path: str) -> Origin:
    return Origin(FIELD, path, "the light decoder")
