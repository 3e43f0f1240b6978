"""The only place that knows diffusers: one small file per model family, and what they share.

`load_policy` gives a model ready for training, `load_skeleton` its figures without loading any weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor

from tempflow.common.errors import BadInput
from tempflow.common.files import resolve
from tempflow.models.attention import check_attention, set_attention
from tempflow.models.families.family import Family
from tempflow.models.families.flux import Flux
from tempflow.models.families.flux2 import Flux2, Flux2Klein
from tempflow.models.families.qwen_image import QwenImage
from tempflow.models.families.sd3 import SD3
from tempflow.models.families.z_image import ZImage
from tempflow.models.index import check_index, origin_of, read_index
from tempflow.models.loading import build_pipeline, check_numbers, dtypes, load_pipeline
from tempflow.models.network.network import Spread, TrainedNetwork
from tempflow.models.pipeline import PipelinePolicy
from tempflow.models.text import TextRows, files_identity
from tempflow.models.without_weights.skeleton import Skeleton
from tempflow.settings.fields import ModelConfig, SampleConfig

FAMILIES = {family.pipeline_class.__name__: family for family in (SD3, Flux, QwenImage, Flux2, Flux2Klein, ZImage)}

transformers.utils.logging.disable_progress_bar()
diffusers.utils.logging.disable_progress_bar()


def load_policy(
    model: ModelConfig,
    sample: SampleConfig,
    device: torch.device,
    keep_reference: bool = True,
    rows: int = 1,
    slowest: Callable[[Tensor], Tensor] | None = None,
    spread: Spread | None = None,
) -> PipelinePolicy:
    """The policy of the pipeline at `model.path`, its transformer ready for training.

    Args:
        keep_reference: False where no KL is asked for; then full training keeps no second copy of the weights.
        rows: of a network call in learning, at which attention backends are compared.
        slowest: the largest of each number over all processes, so that all choose the same one.
        spread: shares the transformer out over processes, from main memory.
    Raises:
        BadInput: no pipeline there, a class that is not supported, or a setting it cannot take; nothing that can be
            told from its configuration waits for the weights.
    """
    load_skeleton(model, sample)
    folder, index, family_class = _find(model)
    pipeline = load_pipeline(family_class.pipeline_class, model, index, device)
    family = family_class(pipeline, model, sample, device)
    if spread is None:
        pipeline.transformer.to(device)
    _place_decoder(pipeline.vae, model, device)
    texts = _texts(family, model, folder, device)
    check_numbers(pipeline, model)
    policy = PipelinePolicy(family, _network(family, model, keep_reference, spread), texts, device)
    set_attention(policy, model.attention, rows, slowest)
    return policy


def load_skeleton(model: ModelConfig, sample: SampleConfig) -> Skeleton:
    """Shapes, schedule and sizes of the policy that `load_policy` would give, from configurations alone.

    Raises:
        BadInput: as `load_policy`, as far as it can be told without weights.
    """
    check_attention(model.attention)
    _, index, family_class = _find(model)
    with torch.random.fork_rng(devices=()):  # initialising adapters without storage draws numbers all the same
        pipeline = build_pipeline(family_class.pipeline_class, model, index)
        with origin_of(model.path).one_line():
            family = family_class(pipeline, model, sample, torch.device("meta"))
        return Skeleton(family, _network(family, model, keep_reference=False), model)


def _find(model: ModelConfig) -> tuple[Path, dict[str, Any], type[Family]]:
    """The pipeline's folder, its index and its family."""
    folder, index = read_index(model.path)
    family = FAMILIES.get(index["_class_name"])
    if family is None:
        hint = f"holds a {index['_class_name']}; supported are {', '.join(FAMILIES)}"
        raise BadInput("model.path", model.path, hint)
    check_index(family.pipeline_class, index, family.optional_parts, origin_of(model.path))
    return folder, index, family


def _network(family: Family, model: ModelConfig, keep_reference: bool, spread: Spread | None = None) -> TrainedNetwork:
    module, kind, targets = family.pipeline.transformer, family.pipeline_class, family.lora_targets
    return TrainedNetwork(module, model, kind, targets, keep_reference, spread)


def _place_decoder(vae: diffusers.ModelMixin, model: ModelConfig, device: torch.device) -> None:
    vae.to(device)
    if model.vae_slicing:
        vae.enable_slicing()
    if model.vae_tiling:
        vae.enable_tiling()


def _texts(family: Family, model: ModelConfig, folder: Path, device: torch.device) -> TextRows:
    """The cache of encoded texts; on disk their names depend on all that decides their values."""
    parts, precision = family.pipeline.components, dtypes(model, device)
    encoders = [part for name, part in parts.items() if name.startswith("text_encoder") and part is not None]
    decisive = {
        "files": files_identity(folder, ("text_encoder", "tokenizer")),
        "precision": [str(precision["text"]), str(precision["transformer"])],
        "tokens": model.text_tokens,
        "libraries": [diffusers.__version__, transformers.__version__],
    }
    cache = None if model.text_cache is None else resolve(model.text_cache, "model.text_cache")
    return TextRows(
        family.encode, encoders, device, precision["transformer"], model.offload_text, cache, json.dumps(decisive)
    )
