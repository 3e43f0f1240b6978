"""What a run needs to know of a model before its weights are loaded: shapes, schedule, parameters and bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tempflow.models.decoding import plan_light
from tempflow.models.families.family import Family
from tempflow.models.loading import dtypes
from tempflow.models.network.network import TrainedNetwork
from tempflow.models.without_weights.rehearsal import META
from tempflow.settings.fields import ModelConfig


@dataclass(frozen=True)
class Part:
    """Parameters of one part of a model."""

    parameters: int
    bytes: int


class Skeleton:
    """A model without weights. Equal in every figure to the policy that `load_policy` would give on a GPU."""

    def __init__(self, family: Family, network: TrainedNetwork, model: ModelConfig):
        self.network = network
        """the transformer, adapters included, without storage"""
        self.latent_shape, self.image_shape = family.latent_shape, family.image_shape
        self.network_rows = 2 if family.classifier_free else 1
        """network rows that one velocity costs"""
        self.tokens = family.grid[0] * family.grid[1] + family.text_tokens
        """image and text tokens in one network row, text as `model.text_tokens` counts it"""
        self.parts = _parts(family, network, model)
        """transformer (adapters included), trainable (of these), merged (what a merged copy adds), text, vae"""
        self.trainable_sizes = [parameter.numel() for parameter in network.trainable().values()]
        """elements of each trainable parameter"""
        self.groups = _groups(network)
        """(parameters, trainable of these) of each repeated block, and of what is around them"""
        self._family, self._decoder_precision = family, dtypes(model, META)["vae"]

    def light(self, path: str | None) -> Part:
        """The light decoder at `path`, or nothing where there is none.

        Raises:
            BadInput: it does not fit the model.
        """
        parameters = plan_light(path, self._family).parameters() if path else ()
        return _part(parameters, self._decoder_precision)

    def sigmas(self, num_steps: int) -> Tensor:
        """(T+1,) float64, those of the pipeline's scheduler."""
        return self._family.sigmas(num_steps)


def _parts(family: Family, network: TrainedNetwork, model: ModelConfig) -> dict[str, Part]:
    precision, components = dtypes(model, META), family.pipeline.components
    trainable = list(network.trainable().values())
    frozen = [p for p in network.module.parameters() if not p.requires_grad]
    held, learnt = _part(frozen, precision["transformer"]), _part(trainable, torch.float32)
    text = [part for name, part in components.items() if name.startswith("text_encoder") and part is not None]
    return {
        "transformer": Part(held.parameters + learnt.parameters, held.bytes + learnt.bytes),
        "trainable": learnt,
        "merged": _part(network.merged_weights(), precision["transformer"]),
        "text": _part((p for encoder in text for p in encoder.parameters()), precision["text"]),
        "vae": _part(components["vae"].parameters(), precision["vae"]),
    }


def _groups(network: TrainedNetwork) -> list[tuple[int, int]]:
    blocks = [_counts(block) for block in network.blocks()]
    whole = _counts(network.module)
    return [*blocks, tuple(total - sum(column) for total, column in zip(whole, zip(*blocks, strict=True), strict=True))]


def _counts(module: nn.Module) -> tuple[int, int]:
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def _part(parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> Part:
    count = sum(parameter.numel() for parameter in parameters)
    return Part(count, count * dtype.itemsize)
