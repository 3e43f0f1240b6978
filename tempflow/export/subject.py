"""What is exported: a checkpoint of a run, and the model it belongs to, without that model's weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from tempflow.common.precision import DTYPES
from tempflow.models.formats.loras import change_of
from tempflow.models.formats.whole import Source, Trained, read_source
from tempflow.models.index import origin_of
from tempflow.models.load import load_skeleton
from tempflow.models.loading import downloaded
from tempflow.models.network.network import TrainedNetwork
from tempflow.models.without_weights.skeleton import Skeleton
from tempflow.settings.fields import ModelConfig
from tempflow.trained.opening import TrainedRun, fitting, open_run


@dataclass(frozen=True)
class Subject:
    """A checkpoint that fits its model."""

    run: TrainedRun
    skeleton: Skeleton
    precision: str | None
    """fp32, bf16 or fp16; None: fp32 for adapters, for whole weights that of the run"""

    @property
    def model(self) -> ModelConfig:
        return self.run.config.model

    @property
    def network(self) -> TrainedNetwork:
        return self.skeleton.network

    @property
    def lora(self) -> bool:
        """Adapters were trained, not all parameters."""
        return self.model.train == "lora"

    @property
    def adapter_dtype(self) -> torch.dtype:
        return DTYPES[self.precision or "fp32"]

    @property
    def whole_dtype(self) -> torch.dtype:
        return DTYPES[self.precision or self.model.dtype]

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.run.folder.resolve().name

    @cached_property
    def trained(self) -> Trained:
        """The change that training made, from the base on: what `model.lora` began with is in it."""
        if not self.lora:
            return Trained({}, self.run.parameters)
        return Trained(change_of(self.run.parameters, self.model.lora_alpha / self.model.lora_rank), {})

    @cached_property
    def base(self) -> Path:
        """The folder of the base, fetched where it is the hub's."""
        return downloaded(self.network.pipeline_class, self.model)

    @cached_property
    def source(self) -> Source:
        """The files of the base's transformer."""
        return read_source(self.base / "transformer", self.trained, origin_of(self.model.path))


def open_subject(folder: Path, checkpoint: str, weights: str, precision: str | None) -> Subject:
    """A checkpoint of a run, compared with its model; that model's weights are not loaded.

    Raises:
        BadInput: no run, no such checkpoint, no model, or a checkpoint of another model.
    """
    run = open_run(folder, checkpoint, weights)
    # What a run began with, or computed with, need not be here any more.
    model = replace(run.config.model, lora=None, attention="auto", gradient_checkpointing=False)
    skeleton = load_skeleton(model, run.config.sample)
    network = skeleton.network
    parameters = fitting(run, network.trainable(), network.module.state_dict())
    return Subject(replace(run, parameters=parameters), skeleton, precision)
