"""Low-rank adapters of a diffusers transformer: where they go, and their files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor, nn

from tempflow.common.errors import BadInput
from tempflow.common.files import resolve
from tempflow.settings.fields import ModelConfig

NAME = "default"
PREFIX = "transformer."


def add_adapters(module: nn.Module, config: ModelConfig, default_targets: Sequence[str]) -> None:
    """Puts fp32 adapters, without effect at first, on the layers that `config.lora_targets` names."""
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=layer_names(module, list(config.lora_targets or default_targets), bool(config.lora_targets)),
        init_lora_weights="gaussian",
    )
    module.add_adapter(lora)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def layer_names(module: nn.Module, targets: list[str], all_needed: bool) -> list[str]:
    """Full names of the linear layers whose names are or end with one of `targets`.

    Raises:
        BadInput: no layer fits a target, where all are needed, or any.
    """
    linear = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    found = {t: [name for name in linear if name == t or name.endswith(f".{t}")] for t in targets}
    missing = [target for target, names in found.items() if not names]
    if missing and (all_needed or len(missing) == len(targets)):
        raise BadInput("model.lora_targets", targets, f"the transformer has no linear layer called {missing[0]}")
    return [name for name in linear if any(name in names for names in found.values())]


def adapted_layers(module: nn.Module) -> dict[str, LoraLayer]:
    """Name -> layer with an adapter."""
    return {name: part for name, part in module.named_modules() if isinstance(part, LoraLayer)}


def adapter_state(module: nn.Module) -> tuple[dict[str, Tensor], dict]:
    """Adapter weights and their configuration, as diffusers' savers take them."""
    weights = {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(module).items()}
    return weights, module.peft_config[NAME].to_dict()


def load_adapters(module: nn.Module, pipeline_class: type[DiffusionPipeline], config: ModelConfig) -> None:
    """Fills the adapters of `module` from `config.lora`.

    Raises:
        BadInput: no LoRA there, another model's, or one of another rank, alpha or set of layers.
    """
    weights, metadata = _read(pipeline_class, str(config.lora))
    own = get_peft_model_state_dict(module)
    known = {name for name, _ in module.named_modules()}
    strange = [name for name in weights if name.rsplit(".lora_", 1)[0] not in known]
    if strange or not weights:
        what = f"its {strange[0]} is no layer of this transformer" if strange else "it holds nothing for a transformer"
        raise BadInput("model.lora", config.lora, f"{what}; give a LoRA of this model")
    if weights.keys() != own.keys():
        example = min(weights.keys() ^ own.keys())
        mend = f"set model.lora_targets to its layers ({example} is only in {'it' if example in weights else 'them'})"
        raise BadInput("model.lora", config.lora, mend)
    for name, tensor in own.items():
        if weights[name].shape != tensor.shape:
            found, wanted = tuple(weights[name].shape), tuple(tensor.shape)
            mend = f"{name} has shape {found}, not {wanted}; set model.lora_rank={min(found)}, or it is another model's"
            raise BadInput("model.lora", config.lora, mend)
    _check_scale(config, metadata)
    if not next(module.parameters()).is_meta:  # a skeleton has nothing to fill
        set_peft_model_state_dict(module, {name: tensor.float() for name, tensor in weights.items()})


def _check_scale(config: ModelConfig, metadata: dict) -> None:
    """Whether the file's adapters mean here what they meant where they were trained."""
    alpha = metadata.get(f"{PREFIX}lora_alpha", config.lora_rank)  # diffusers' reading of a file that does not say
    if alpha != config.lora_alpha:
        raise BadInput("model.lora", config.lora, f"its lora_alpha is {alpha}; set model.lora_alpha={alpha}")
    for kind in ("use_rslora", "use_dora"):
        if metadata.get(f"{PREFIX}{kind}"):
            raise BadInput("model.lora", config.lora, f"it was trained with {kind}; only plain LoRA can be continued")


def _read(pipeline_class: type[DiffusionPipeline], source: str) -> tuple[dict[str, Tensor], dict]:
    """Adapter weights by the transformer's names, and metadata; other trainers' formats are converted by diffusers."""
    path = resolve(source)
    try:
        found = pipeline_class.lora_state_dict(
            str(path) if path.exists() else source, return_lora_metadata=True, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:160]
        raise BadInput("model.lora", source, f"does not load as a LoRA ({reason})") from error
    weights, metadata = found[0], found[-1] or {}
    return {n.removeprefix(PREFIX): tensor for n, tensor in weights.items() if n.startswith(PREFIX)}, metadata


def save_adapters(module: nn.Module, pipeline_class: type[DiffusionPipeline], folder: Path) -> None:
    """Writes `pytorch_lora_weights.safetensors` for `load_lora_weights`."""
    weights, metadata = adapter_state(module)
    pipeline_class.save_lora_weights(
        folder,
        transformer_lora_layers={name: tensor.to("cpu", torch.float32) for name, tensor in weights.items()},
        transformer_lora_adapter_metadata=metadata,
    )
