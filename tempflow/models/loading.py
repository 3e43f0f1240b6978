"""From `model.path` to a diffusers pipeline, with its weights or, for planning and checks, without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError

from tempflow.common.errors import BadInput
from tempflow.common.files import resolve
from tempflow.common.precision import DTYPES, default_precision
from tempflow.settings.fields import ModelConfig

LIBRARIES = {"diffusers": diffusers, "transformers": transformers}


def dtypes(model: ModelConfig, device: torch.device) -> dict[str, torch.dtype]:
    """Precision by part on a device: transformer, vae, and text for the text encoders."""
    return {
        "transformer": DTYPES[model.dtype],
        "vae": DTYPES[model.vae_dtype or default_precision(device, on_cpu=model.dtype)],
        "text": DTYPES[model.text_dtype or model.dtype],
    }


def read_index(path: str) -> tuple[Path, dict[str, Any]]:
    """The pipeline's model_index.json, from a folder or the hub: the folder it lies in, and its content.

    Raises:
        BadInput: there is none, or it names no pipeline class.
    """
    folder = resolve(path)
    file = folder / "model_index.json" if folder.exists() else _hub_index(path)
    if not file.is_file():
        raise BadInput("model.path", path, "the folder has no model_index.json; give a diffusers pipeline folder")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        index["_class_name"].lower()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput("model.path", path, "its model_index.json names no pipeline class") from error
    return file.parent, index


def _hub_index(path: str) -> Path:
    """model_index.json of a hub repository, from the cache or the network."""
    if path.count("/") != 1 or path.startswith((".", "/", "~", "tempflow:")):
        raise BadInput("model.path", path, "no such folder")
    try:
        return Path(hf_hub_download(path, "model_index.json"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        hint = "no such folder, and the hub did not give it (absent, gated, or no network); check path and login"
        raise BadInput("model.path", path, hint) from error


def _source(path: str) -> str:
    folder = resolve(path)
    return str(folder) if folder.exists() else path


def load_pipeline(
    pipeline_class: type[DiffusionPipeline], model: ModelConfig, index: dict, device: torch.device
) -> DiffusionPipeline:
    """The pipeline with its weights, on the CPU, each part in its precision for `device`, frozen.

    Raises:
        BadInput: a part is missing or does not load.
    """
    absent = {name: None for name, value in index.items() if isinstance(value, list) and value[0] is None}
    parts = dtypes(model, device)
    precision = {"transformer": parts["transformer"], "vae": parts["vae"], "default": parts["text"]}
    try:
        pipeline = pipeline_class.from_pretrained(
            _source(model.path), dtype=precision, use_safetensors=True, **absent
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise _not_loading(model, error) from error
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    return pipeline


def build_pipeline(pipeline_class: type[DiffusionPipeline], model: ModelConfig, index: dict) -> DiffusionPipeline:
    """The pipeline from its configurations alone: networks without storage (device `meta`), no tokenizers.

    Raises:
        BadInput: a part's configuration is missing or does not fit its class.
    """
    modules, options = {}, {}
    try:
        for name, value in index.items():
            if isinstance(value, list):
                modules[name] = _build_part(_source(model.path), name, *value)
            elif not name.startswith("_"):
                options[name] = value
        return pipeline_class(**modules, **options)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        raise _not_loading(model, error) from error


def _build_part(source: str, name: str, library: str | None, class_name: str | None) -> Any:
    """A network on `meta`, the scheduler, or None for what has no weights."""
    if library is None or class_name is None or name.startswith(("tokenizer", "feature_extractor")):
        return None
    part = getattr(LIBRARIES[library], class_name)
    if name == "scheduler":
        return part.from_pretrained(source, subfolder=name)
    with torch.device("meta"):
        if library == "diffusers":
            return part.from_config(part.load_config(source, subfolder=name)).requires_grad_(False)
        return part(part.config_class.from_pretrained(source, subfolder=name)).requires_grad_(False)


def _not_loading(model: ModelConfig, error: Exception) -> BadInput:
    reason = " ".join(str(error).split())[:200]
    return BadInput("model.path", model.path, f"the pipeline does not load ({reason})")
