"""The layers of a transformer as its authors' files have them, which ComfyUI and sd-scripts name.

diffusers splits layers that the authors keep as one (query, key and value; in FLUX.1's single blocks a feed-forward
besides). The change of such a layer is put together exactly: the ranks of its parts stand beside each other, each
reaching its own rows alone. And diffusers' last norm gives scale and shift, where the authors' gives shift and scale.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from diffusers.models.normalization import AdaLayerNormContinuous
from torch import Tensor, nn

from tempflow.common.errors import BadInput


@dataclass(frozen=True)
class Change:
    """The change up @ down of a linear layer's weight, at scale 1."""

    down: Tensor
    """(rank, in)"""
    up: Tensor
    """(out, rank)"""


Changes = dict[str, Change]
"""layer -> its change"""


def rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in the precision of a file.

    Raises:
        BadInput: numbers that fp16 cannot hold.
    """
    result = tensor.to(dtype).contiguous()
    if dtype == torch.float16 and not torch.isfinite(result).all():
        raise BadInput("--dtype", "fp16", f"{name} has numbers that fp16 cannot hold; take bf16 or fp32")
    return result


@dataclass(frozen=True)
class Layout:
    """How the authors' layers are made of diffusers'. `{}` stands for the number of a block."""

    stacked: dict[str, tuple[str, ...]]
    """the authors' layer -> diffusers' layers whose outputs it gives, in this order"""
    shift_first: bool
    """the norm that diffusers makes give scale and shift gives shift and scale"""


def _parts(block: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{block}.{{}}.{name}" for name in names)


QKV, ADDED_QKV = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"

SD3 = Layout(
    {
        "joint_blocks.{}.x_block.attn.qkv": _parts(DOUBLE, *QKV),
        "joint_blocks.{}.x_block.attn.proj": _parts(DOUBLE, "attn.to_out.0"),
        "joint_blocks.{}.x_block.attn2.qkv": _parts(DOUBLE, "attn2.to_q", "attn2.to_k", "attn2.to_v"),
        "joint_blocks.{}.x_block.attn2.proj": _parts(DOUBLE, "attn2.to_out.0"),
        "joint_blocks.{}.x_block.adaLN_modulation.1": _parts(DOUBLE, "norm1.linear"),
        "joint_blocks.{}.x_block.mlp.fc1": _parts(DOUBLE, "ff.net.0.proj"),
        "joint_blocks.{}.x_block.mlp.fc2": _parts(DOUBLE, "ff.net.2"),
        "joint_blocks.{}.context_block.attn.qkv": _parts(DOUBLE, *ADDED_QKV),
        "joint_blocks.{}.context_block.attn.proj": _parts(DOUBLE, "attn.to_add_out"),
        "joint_blocks.{}.context_block.adaLN_modulation.1": _parts(DOUBLE, "norm1_context.linear"),
        "joint_blocks.{}.context_block.mlp.fc1": _parts(DOUBLE, "ff_context.net.0.proj"),
        "joint_blocks.{}.context_block.mlp.fc2": _parts(DOUBLE, "ff_context.net.2"),
        "context_embedder": ("context_embedder",),
        "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
        "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
        "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
        "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear",),
        "final_layer.linear": ("proj_out",),
    },
    shift_first=True,
)

_FLUX_ATTENTION = {
    "double_blocks.{}.img_attn.qkv": _parts(DOUBLE, *QKV),
    "double_blocks.{}.img_attn.proj": _parts(DOUBLE, "attn.to_out.0"),
    "double_blocks.{}.txt_attn.qkv": _parts(DOUBLE, *ADDED_QKV),
    "double_blocks.{}.txt_attn.proj": _parts(DOUBLE, "attn.to_add_out"),
}
_FLUX_ENDS = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}

FLUX = Layout(
    {
        **_FLUX_ATTENTION,
        "double_blocks.{}.img_mlp.0": _parts(DOUBLE, "ff.net.0.proj"),
        "double_blocks.{}.img_mlp.2": _parts(DOUBLE, "ff.net.2"),
        "double_blocks.{}.txt_mlp.0": _parts(DOUBLE, "ff_context.net.0.proj"),
        "double_blocks.{}.txt_mlp.2": _parts(DOUBLE, "ff_context.net.2"),
        "double_blocks.{}.img_mod.lin": _parts(DOUBLE, "norm1.linear"),
        "double_blocks.{}.txt_mod.lin": _parts(DOUBLE, "norm1_context.linear"),
        "single_blocks.{}.linear1": _parts(SINGLE, *QKV, "proj_mlp"),
        "single_blocks.{}.linear2": _parts(SINGLE, "proj_out"),
        "single_blocks.{}.modulation.lin": _parts(SINGLE, "norm.linear"),
        **_FLUX_ENDS,
        "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
        "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
        "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
        "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
        "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
        "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    },
    shift_first=True,
)

FLUX2 = Layout(
    {
        **_FLUX_ATTENTION,
        "double_blocks.{}.img_mlp.0": _parts(DOUBLE, "ff.linear_in"),
        "double_blocks.{}.img_mlp.2": _parts(DOUBLE, "ff.linear_out"),
        "double_blocks.{}.txt_mlp.0": _parts(DOUBLE, "ff_context.linear_in"),
        "double_blocks.{}.txt_mlp.2": _parts(DOUBLE, "ff_context.linear_out"),
        "single_blocks.{}.linear1": _parts(SINGLE, "attn.to_qkv_mlp_proj"),
        "single_blocks.{}.linear2": _parts(SINGLE, "attn.to_out"),
        **_FLUX_ENDS,
        "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
        "time_in.out_layer": ("time_guidance_embed.timestep_embedder.linear_2",),
        "guidance_in.in_layer": ("time_guidance_embed.guidance_embedder.linear_1",),
        "guidance_in.out_layer": ("time_guidance_embed.guidance_embedder.linear_2",),
        "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
        "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
        "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    },
    shift_first=True,
)

SAME = Layout({}, shift_first=False)
"""The names that diffusers has"""


def arrange(changes: Changes, module: nn.Module, layout: Layout) -> Changes:
    """The changes of a diffusers transformer as changes of the layers of a layout.

    Args:
        module: the transformer, with or without storage; shapes and kinds of layers are read from it.
    Raises:
        BadInput: a layer that has no place in the layout.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name in changes:
        whole, number = _place(name, layout)
        found[whole.format(number)] = tuple(part.format(number) for part in layout.stacked.get(whole, (whole,)))
    return {whole: _stacked(parts, changes, module, layout.shift_first) for whole, parts in found.items()}


def place_of(name: str, layout: Layout) -> str:
    """The layer of a layout that holds a layer of diffusers.

    Raises:
        BadInput: it has no place in the layout.
    """
    whole, number = _place(name, layout)
    return whole.format(number)


def _place(name: str, layout: Layout) -> tuple[str, str]:
    """The layout's layer, `{}` for the number of its block, and that number."""
    if not layout.stacked:
        return name, ""
    pattern, number = _pattern(name)
    found = next((whole for whole, parts in layout.stacked.items() if pattern in parts), None)
    if found is None:
        raise BadInput("model.lora_targets", name, "the authors' files have no layer for it; take --to diffusers")
    return found, number


def _pattern(name: str) -> tuple[str, str]:
    """`transformer_blocks.3.attn.to_q` as `transformer_blocks.{}.attn.to_q` and `3`."""
    first, _, rest = name.partition(".")
    number, dot, inner = rest.partition(".")
    return (f"{first}.{{}}.{inner}", number) if dot and number.isdigit() else (name, "")


def _stacked(parts: Iterable[str], changes: Changes, module: nn.Module, shift_first: bool) -> Change:
    """The change of the layer that gives the outputs of `parts` one below the other; some may have none."""
    downs, ups = [], []
    for name in parts:
        change, rows = changes.get(name), _rows(module, name)
        if change is None:
            ups.append(torch.zeros(rows, 0))
            continue
        swap = shift_first and isinstance(module.get_submodule(name.rpartition(".")[0]), AdaLayerNormContinuous)
        downs.append(change.down)
        ups.append(torch.cat(change.up.chunk(2)[::-1]) if swap else change.up)
    return Change(torch.cat(downs), torch.block_diag(*ups))


def _rows(module: nn.Module, name: str) -> int:
    layer = module.get_submodule(name)
    return getattr(layer, "base_layer", layer).weight.shape[0]
