"""The only place that knows diffusers: one small file per model family."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers.utils import logging as transformers_logging

from tempflow.errors import BadInput
from tempflow.models.sd3 import SD3Policy
from tempflow.paths import resolve
from tempflow.policy import Policy
from tempflow.settings import ModelConfig, SampleConfig

transformers_logging.disable_progress_bar()
FAMILIES = {"StableDiffusion3Pipeline": SD3Policy}


def load_policy(
    model: ModelConfig, sample: SampleConfig, device: torch.device, keep_reference: bool = True
) -> Policy:
    """The policy of the pipeline at `model.path`, its transformer ready for training.

    `keep_reference` is False where no KL is asked for; then full training keeps no second copy of the weights.

    Raises:
        BadInput: no pipeline there, a class that is not supported, or an image size it cannot take.
    """
    family = FAMILIES.get(pipeline_class(model.path))
    if family is None:
        found, known = pipeline_class(model.path), ", ".join(FAMILIES)
        raise BadInput("model.path", model.path, f"holds a {found}; supported are {known}")
    return family.load(model, sample, device, keep_reference)


def pipeline_class(path: str) -> str:
    """The class name in the pipeline's model_index.json."""
    folder = resolve(path)
    index = folder / "model_index.json"
    if not folder.exists():
        index = _hub_index(path)
    if not index.is_file():
        raise BadInput("model.path", path, "the folder has no model_index.json; give a diffusers pipeline folder")
    try:
        return str(json.loads(index.read_text(encoding="utf-8"))["_class_name"])
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput("model.path", path, "its model_index.json names no pipeline class") from error


def _hub_index(path: str) -> Path:
    """model_index.json of a hub repository, from the cache or the network."""
    if path.count("/") != 1 or path.startswith((".", "/", "~", "tempflow:")):
        raise BadInput("model.path", path, "no such folder")
    try:
        return Path(hf_hub_download(path, "model_index.json"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        mend = "no such folder, and the hub did not give it (absent, gated, or no network); check path and login"
        raise BadInput("model.path", path, mend) from error
