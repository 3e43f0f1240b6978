"""A policy out of a diffusers pipeline: what all model families have in common."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from tempflow.models.decoding import FamilyDecoder, load_light
from tempflow.models.families.family import Family
from tempflow.models.network.network import TrainedNetwork
from tempflow.models.text import TextRows
from tempflow.policy import Conditioning, ImageDecoder

BLANK = "blank."


class PipelinePolicy:
    """A `tempflow.policy.Policy` made of a family, its network and its texts."""

    def __init__(self, family: Family, network: TrainedNetwork, texts: TextRows, device: torch.device):
        self.family, self.network, self.texts, self.device = family, network, texts, device
        self.latent_shape, self.image_shape = family.latent_shape, family.image_shape
        self.network_rows = 2 if family.classifier_free else 1
        self.blank = texts.rows([family.blank]) if family.classifier_free else {}
        self.decoder = FamilyDecoder(family, family.pipeline.vae, device)
        self.attention = "native"
        """the attention backend, and how it was chosen"""

    @property
    def pipeline(self):
        """The diffusers pipeline, with the network under training as its transformer."""
        return self.family.pipeline

    def sigmas(self, num_steps: int) -> Tensor:
        return self.family.sigmas(num_steps)

    def encode(self, texts: Sequence[str]) -> Conditioning:
        return Conditioning(self.texts.rows(texts))

    def velocity(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guided: Tensor | bool = True
    ) -> Tensor:
        text = conditioning.tensors
        if self.network_rows == 1 or guided is False:
            return self._network(latents, sigma, text)
        rows = len(latents)
        both = {name: torch.cat((self.blank[name].expand(rows, *row.shape[1:]), row)) for name, row in text.items()}
        uncond, cond = self._network(torch.cat((latents, latents)), torch.cat((sigma, sigma)), both).chunk(2)
        velocity = self.family.guide(uncond, cond)
        if guided is True:
            return velocity
        return torch.where(guided.view(-1, *[1] * (cond.dim() - 1)), velocity, cond)

    def _network(self, latents: Tensor, sigma: Tensor, text: dict[str, Tensor]) -> Tensor:
        inputs = self.family.network_inputs(latents.to(self.network.dtype), sigma, text)
        return self.family.velocity(self.network.forward(inputs, self.device))

    @property
    def finite(self) -> Tensor | None:
        return self.decoder.finite

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder.decode(latents)

    def trainable(self) -> dict[str, nn.Parameter]:
        return self.network.trainable()

    def reference(self) -> AbstractContextManager[None]:
        return self.network.reference()

    def merged(self) -> AbstractContextManager[None]:
        return self.network.merged()

    def refresh_merged(self) -> None:
        self.network.refresh_merged()

    def quantise_merged(self, smallest: int = 1024) -> str:
        return self.network.quantise_merged(smallest)

    def blocks(self) -> list[nn.Module]:
        return self.network.blocks()

    def prepare_decoder(self, compiled: bool) -> None:
        self.decoder.prepare(compiled)

    def light_decoder(self, path: str, compiled: bool) -> ImageDecoder:
        decoder = FamilyDecoder(self.family, load_light(path, self.family), self.device)
        decoder.prepare(compiled)
        return decoder

    def export(self, write: bool = True) -> Callable[[Path], None]:
        return partial(self._write, self.network.whole_weights(keep=write))

    def save(self, folder: Path) -> None:
        """`pytorch_lora_weights.safetensors` for `load_lora_weights`, or the whole transformer in `transformer/`."""
        self.export()(folder)

    def _write(self, weights: dict[str, Tensor], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as workshop:
            fresh, target = Path(workshop) / "transformer", folder / "transformer"
            self.network.save(fresh, weights)
            if self.network.config.train == "lora":
                for file in fresh.iterdir():
                    os.replace(file, folder / file.name)
                return
            if target.exists():
                target.rename(Path(workshop) / "before")
            fresh.rename(target)
