"""LoRA files of other programs: which names their readers look for, and the scale that they apply.

All readers take up @ down * alpha / rank, rank being the number of rows of `down`, and alpha = rank where there is no
alpha. Files written here have alpha = rank, or none, so that a strength of 1 is the trained change in each of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save
from torch import Tensor, nn

from tempflow.common.errors import BadInput
from tempflow.common.files import write_atomically
from tempflow.models.formats.layouts import FLUX, FLUX2, SAME, SD3, Change, Changes, Layout, arrange, place_of, rounded
from tempflow.models.network.adapters import NAME


@dataclass(frozen=True)
class Naming:
    """How a reader's tensors are called."""

    prefix: str
    dot: str
    """what stands between the parts of a layer's name"""
    down: str
    up: str
    alpha: bool
    """whether a tensor tells alpha"""


@dataclass(frozen=True)
class LoraFormat:
    """A reader's rule for one family of models."""

    layout: Layout
    naming: Naming
    known: tuple[str, ...] = ("",)
    """how the names of the layers begin that the reader looks for, in the layout"""


COMFYUI = Naming("diffusion_model.", ".", "lora_down", "lora_up", alpha=True)
COMFYUI_AB = Naming("diffusion_model.", ".", "lora_A", "lora_B", alpha=False)
"""as diffusers reads ComfyUI's files for FLUX.2, too; ComfyUI reads either"""
KOHYA = Naming("lora_unet_", "_", "lora_down", "lora_up", alpha=True)

FLUX_BLOCKS = ("double_blocks.", "single_blocks.")
FLUX_INPUTS = ("img_in", "txt_in", "time_in.", "vector_in.", "guidance_in.")
"""what sd-scripts looks for besides the blocks; of its scripts some pass over any other layer, and some fail at it"""
Z_IMAGE_BLOCKS = ("layers.", "noise_refiner.", "context_refiner.")

FORMATS: dict[str, dict[str, LoraFormat]] = {
    "comfyui": {
        "StableDiffusion3Pipeline": LoraFormat(SD3, COMFYUI),
        "FluxPipeline": LoraFormat(FLUX, COMFYUI),
        "Flux2Pipeline": LoraFormat(FLUX2, COMFYUI_AB),
        "Flux2KleinPipeline": LoraFormat(FLUX2, COMFYUI_AB),
        "QwenImagePipeline": LoraFormat(SAME, COMFYUI),
        "ZImagePipeline": LoraFormat(SAME, COMFYUI, Z_IMAGE_BLOCKS),
    },
    "kohya": {
        "StableDiffusion3Pipeline": LoraFormat(SD3, KOHYA),
        "FluxPipeline": LoraFormat(FLUX, KOHYA, FLUX_BLOCKS + FLUX_INPUTS),
        "Flux2Pipeline": LoraFormat(FLUX2, KOHYA, FLUX_BLOCKS),
        "Flux2KleinPipeline": LoraFormat(FLUX2, KOHYA, FLUX_BLOCKS),
        "QwenImagePipeline": LoraFormat(SAME, KOHYA, ("transformer_blocks.",)),
        "ZImagePipeline": LoraFormat(SAME, KOHYA, Z_IMAGE_BLOCKS),
    },
}
"""Format -> pipeline class -> rule. kohya: sd-scripts (SD3, FLUX.1) and its successor musubi-tuner (the others)."""


def change_of(parameters: Mapping[str, Tensor], scale: float) -> Changes:
    """The changes that adapters make, by layer.

    Args:
        parameters: of peft's adapters, as `LAYER.lora_A.default.weight`.
        scale: that their output is multiplied by; it goes into `up`.
    """
    down, up = (f".lora_{half}.{NAME}.weight" for half in "AB")
    layers = [name.removesuffix(down) for name in parameters if name.endswith(down)]
    return {name: Change(parameters[name + down].float(), parameters[name + up].float() * scale) for name in layers}


def lora_format(to: str, kind: type[DiffusionPipeline]) -> LoraFormat:
    """The rule of a format for a pipeline.

    Raises:
        BadInput: it has none for this family; the formats that have are named.
    """
    rules = FORMATS[to]
    if kind.__name__ not in rules:
        others = [name for name, families in FORMATS.items() if kind.__name__ in families]
        hint = f"has no rule for a {kind.__name__}; take one of {', '.join(['diffusers', *others, 'merged', 'hub'])}"
        raise BadInput("--to", to, hint)
    return rules[kind.__name__]


def lora_tensors(changes: Changes, module: nn.Module, rule: LoraFormat, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a file.

    Args:
        changes: of the layers of `module`, diffusers' transformer.
    Raises:
        BadInput: a changed layer that the reader does not look for.
    """
    naming, tensors = rule.naming, {}
    for layer in changes:
        if not place_of(layer, rule.layout).startswith(rule.known):
            raise BadInput("model.lora_targets", layer, "this format has no name for the layer; take --to diffusers")
    for name, change in arrange(changes, module, rule.layout).items():
        base = naming.prefix + name.replace(".", naming.dot)
        tensors[f"{base}.{naming.down}.weight"] = rounded(name, change.down, dtype)
        tensors[f"{base}.{naming.up}.weight"] = rounded(name, change.up, dtype)
        if naming.alpha:
            tensors[f"{base}.alpha"] = torch.tensor(float(len(change.down)))  # fp32: bf16 knows no odd numbers past 256
    return tensors


def write_lora(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes the file, whole or not at all."""
    write_atomically(path, save(tensors, metadata={"format": "pt", **metadata}))
