"""From `model.path` to a diffusers pipeline, with its weights or, for planning and checks, without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from tempflow.common.files import resolve
from tempflow.common.precision import DTYPES, default_precision
from tempflow.models.index import class_of, is_given, origin_of
from tempflow.models.weights.files import check_files
from tempflow.models.weights.parts import check_finite, load_part, without_weights
from tempflow.settings.fields import ModelConfig


def dtypes(model: ModelConfig, device: torch.device) -> dict[str, torch.dtype]:
    """Precision by part on a device: transformer, vae, and text for the text encoders."""
    return {
        "transformer": DTYPES[model.dtype],
        "vae": DTYPES[model.vae_dtype or default_precision(device, on_cpu=model.dtype)],
        "text": DTYPES[model.text_dtype or model.dtype],
    }


def _source(path: str) -> str:
    folder = resolve(path, "model.path")
    return str(folder) if folder.exists() else path


def load_pipeline(
    pipeline_class: type[DiffusionPipeline], model: ModelConfig, index: dict, device: torch.device
) -> DiffusionPipeline:
    """The pipeline with its weights, on the CPU, each part in its precision for `device`, frozen.

    Raises:
        BadInput: a part is missing, does not load, or is not what its configuration says.
    """
    origin, precision = origin_of(model.path), dtypes(model, device)
    folder = downloaded(pipeline_class, model)
    given: dict[str, Any] = {}
    for name, value in index.items():
        if isinstance(value, list) and not is_given(value):
            given[name] = None
        elif _is_network(name, value):
            kind, dtype = class_of(value), precision.get(name, precision["text"])
            given[name] = load_part(kind, folder / name, dtype, origin)
        elif isinstance(value, list):
            check_files(folder / name, origin)
    with origin.one_line():
        pipeline = pipeline_class.from_pretrained(folder, use_safetensors=True, **given)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check_numbers(pipeline: DiffusionPipeline, model: ModelConfig) -> None:
    """Whether the weights of all networks of a pipeline are numbers, where they lie now.

    Raises:
        BadInput: file and tensor of the first that are not.
    """
    folder = downloaded(type(pipeline), model)
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            check_finite(part, folder / name, origin_of(model.path))


def downloaded(pipeline_class: type[DiffusionPipeline], model: ModelConfig) -> Path:
    """The folder of the pipeline; one of the hub is fetched, safetensors and configurations only."""
    folder = resolve(model.path, "model.path")
    if folder.exists():
        return folder
    with origin_of(model.path).one_line():
        return Path(pipeline_class.download(model.path, use_safetensors=True))


def _is_network(name: str, value: Any) -> bool:
    return is_given(value) and not name.startswith(("tokenizer", "feature_extractor", "scheduler"))


def build_pipeline(pipeline_class: type[DiffusionPipeline], model: ModelConfig, index: dict) -> DiffusionPipeline:
    """The pipeline from its configurations alone: networks without storage (device `meta`), no tokenizers.

    Raises:
        BadInput: a part's configuration is missing or does not fit its class.
    """
    modules, options, source = {}, {}, _source(model.path)
    with origin_of(model.path).one_line():
        for name, value in index.items():
            if isinstance(value, list):
                modules[name] = _build_part(source, name, value)
            elif not name.startswith("_"):
                options[name] = value
        return pipeline_class(**modules, **options)


def _build_part(source: str, name: str, value: list) -> Any:
    """A network on `meta`, the scheduler, or None for what has no weights."""
    if _is_network(name, value):
        return without_weights(class_of(value), source, subfolder=name)
    if name != "scheduler":
        return None
    return class_of(value).from_pretrained(source, subfolder=name)
