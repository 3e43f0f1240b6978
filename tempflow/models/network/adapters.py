"""Low-rank adapters of a diffusers transformer: where they go, and their files.

A file has the scale lora_alpha / lora_rank multiplied into lora_B, and tells lora_alpha = lora_rank. So all that read
it apply the same change of the weights, lora_B lora_A: diffusers and peft, which go by the metadata, and ComfyUI, which
goes by `.alpha` tensors and takes the scale 1 where there are none. (Flow-GRPO's files keep the scale in a
configuration beside them.) When a file is continued, its scale is divided out again by the run's own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from tempflow.common.errors import BadInput
from tempflow.common.files import resolve
from tempflow.common.machine import host_memory
from tempflow.common.tensors import whole
from tempflow.models.weights.files import check_safetensors, read_tensors
from tempflow.models.weights.origin import Origin
from tempflow.models.weights.parts import nonfinite
from tempflow.settings.fields import ModelConfig

NAME = "default"
PREFIX = "transformer."


def add_adapters(module: nn.Module, config: ModelConfig, default_targets: Sequence[str]) -> None:
    """Puts fp32 adapters, without effect at first, on the layers that `config.lora_targets` names."""
    names = layer_names(module, list(config.lora_targets or default_targets), bool(config.lora_targets))
    _check_rank(module, config.lora_rank, names)
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=names,
        init_lora_weights="gaussian",
    )
    module.add_adapter(lora)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for layer in adapted_layers(module).values():
        # Else peft widens every input to the adapter's fp32, and autocast rounds it back to the very same numbers: a
        # copy for each projection to keep until the backward pass.
        layer.cast_input_dtype_enabled = False


def _check_rank(module: nn.Module, rank: int, names: Sequence[str]) -> None:
    """Adapters of this rank can be held: they are made in main memory, even for a plan."""
    sides = sum(sum(module.get_submodule(name).weight.shape) for name in names)
    needed, most = 4 * rank * sides, host_memory()
    if needed > most:
        hint = f"adapters of this rank need {needed / 2**30:,.0f} GiB, and there are {most / 2**30:,.0f}; lower it"
        raise BadInput("model.lora_rank", rank, hint)


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
    weights = {name: whole(t.detach()).clone() for name, t in get_peft_model_state_dict(module).items()}
    return weights, module.peft_config[NAME].to_dict()


def load_adapters(module: nn.Module, pipeline_class: type[DiffusionPipeline], config: ModelConfig) -> None:
    """Fills the adapters of `module` from `config.lora`.

    Raises:
        BadInput: no LoRA there, another model's, or one of another kind, rank or set of layers.
    """
    weights, metadata = _read(pipeline_class, str(config.lora))
    _check_kind(config, metadata)
    own = get_peft_model_state_dict(module)
    known = {name for name, _ in module.named_modules()}
    strange = [name for name in weights if name.rsplit(".lora_", 1)[0] not in known]
    if strange or not weights:
        what = f"its {strange[0]} is no layer of this transformer" if strange else "it holds nothing for a transformer"
        raise BadInput("model.lora", config.lora, f"{what}; give a LoRA of this model")
    if weights.keys() != own.keys():
        example = min(weights.keys() ^ own.keys())
        hint = f"set model.lora_targets to its layers ({example} is only in {'it' if example in weights else 'them'})"
        raise BadInput("model.lora", config.lora, hint)
    for name, tensor in own.items():
        if weights[name].shape != tensor.shape:
            found, wanted = tuple(weights[name].shape), tuple(tensor.shape)
            hint = f"{name} has shape {found}, not {wanted}; set model.lora_rank={min(found)}, or it is another model's"
            raise BadInput("model.lora", config.lora, hint)
    if not next(module.parameters()).is_meta:  # a skeleton has nothing to fill
        alpha = metadata.get(f"{PREFIX}lora_alpha", config.lora_rank)  # as diffusers reads a file that does not say
        set_peft_model_state_dict(module, _scaled(weights, alpha / config.lora_alpha))


def _check_kind(config: ModelConfig, metadata: dict) -> None:
    """Whether the file's adapters are computed as those here are."""
    for kind in ("use_rslora", "use_dora"):
        if metadata.get(f"{PREFIX}{kind}"):
            raise BadInput("model.lora", config.lora, f"it was trained with {kind}; only plain LoRA can be continued")
    if metadata.get(f"{PREFIX}alpha_pattern"):
        raise BadInput("model.lora", config.lora, "its lora_alpha differs by layer (alpha_pattern); give one with one")


def _scaled(weights: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """fp32 adapter weights whose effect is `scale` times that of `weights`."""
    return {n: tensor.float() * scale if ".lora_B." in n else tensor.float() for n, tensor in weights.items()}


def _folded(weights: dict[str, Tensor], alphas: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of scale 1 from those of a file that has an `.alpha` tensor for some layers."""
    result = {name: tensor for name, tensor in weights.items() if not name.endswith(".alpha")}
    for name, alpha in alphas.items():
        out = name.removesuffix(".alpha") + ".lora_B.weight"
        if out in result:
            result[out] = result[out].float() * (float(alpha) / result[out].shape[1])
    return result


def _read(pipeline_class: type[DiffusionPipeline], source: str) -> tuple[dict[str, Tensor], dict]:
    """Adapter weights by the transformer's names, and metadata; other trainers' formats are converted by diffusers."""
    path, origin = resolve(source, "model.lora"), Origin("model.lora", source, "the LoRA")
    for file in _local_files(path):
        check_safetensors(file, origin)
    with origin.one_line():
        found = pipeline_class.lora_state_dict(
            str(path) if path.exists() else source, return_lora_metadata=True, return_alphas=True, use_safetensors=True
        )
    apart = found[1] if len(found) == 3 else None  # FLUX's loader takes `.alpha` tensors out, the others leave them in
    alphas = apart or {name: tensor for name, tensor in found[0].items() if name.endswith(".alpha")}
    weights = _folded(found[0], alphas)
    own = {n.removeprefix(PREFIX): tensor for n, tensor in weights.items() if n.startswith(PREFIX)}
    for name in nonfinite(own):
        raise origin.refusal(f"its {name} holds NaN or infinity")
    return own, found[-1] or {}


def _local_files(path: Path) -> list[Path]:
    """The file, or the safetensors files of a folder; none of them may be of another kind."""
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.exists() else []


def read_saved(file: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The adapters in a file of `save_adapters`, by the names and in the scale of the parameters under training.

    Raises:
        BadInput: it does not load, or holds NaN or infinity.
    """
    origin = Origin("--checkpoint", str(file), "the LoRA")
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in read_tensors(file, origin).items()}
    scaled = _scaled(weights, config.lora_rank / config.lora_alpha)
    return {re.sub(r"(\.lora_[AB])\.", rf"\1.{NAME}.", name): tensor for name, tensor in scaled.items()}


def saved_names(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters under training by the names that their files have."""
    return {name.replace(f".{NAME}.", "."): tensor for name, tensor in parameters.items()}


def save_adapters(
    module: nn.Module, pipeline_class: type[DiffusionPipeline], folder: Path, weights: dict[str, Tensor],
    dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """Writes `weights` of `adapter_state` as `pytorch_lora_weights.safetensors` for `load_lora_weights`, of scale 1."""
    metadata = module.peft_config[NAME].to_dict()
    weights = _scaled(weights, metadata["lora_alpha"] / metadata["r"])
    pipeline_class.save_lora_weights(
        folder,
        transformer_lora_layers={name: tensor.to("cpu", dtype) for name, tensor in weights.items()},
        transformer_lora_adapter_metadata={**metadata, "lora_alpha": metadata["r"]},
    )
