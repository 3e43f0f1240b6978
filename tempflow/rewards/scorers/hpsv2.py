"""HPSv2.1: human preference of pictures for a prompt (arXiv 2306.09341).

Score: the plain cosine, about 0.2 to 0.35, as in the official package and Flow-GRPO. The official checkpoint is
open_clip's ViT-H/14; its tensors are renamed to those of transformers' CLIP, which computes the same
(tests/rewards/test_clip.py). Pictures are resized by their longer side, with black margins, as HPSv2 does.

Left out: ftfy, which open_clip runs over prompts to repair wrongly decoded text. The rest of its cleaning is here.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from tempflow.prompts import Prompt
from tempflow.rewards.parts.clip_model import ClipEncoder
from tempflow.rewards.parts.pixels import check_images, letterbox_pixels
from tempflow.rewards.parts.weights import (
    depth,
    dtype_of,
    frozen,
    install,
    needed,
    option,
    read_tensors,
    renamed,
    tokenizer_of,
)

HEADS = 16
"""of both towers of ViT-H/14; the one size that the shapes of the tensors do not tell"""

RULES = [
    (r"^visual\.(class_embedding|conv1\.weight|positional_embedding)", r"vision_model.embeddings.\1"),
    (r"^(token_embedding|positional_embedding)", r"text_model.embeddings.\1"),
    (r"conv1\.weight$", "patch_embedding.weight"),
    (r"positional_embedding$", "position_embedding.weight"),
    (r"^visual\.ln_pre", "vision_model.pre_layrnorm"),
    (r"^visual\.ln_post", "vision_model.post_layernorm"),
    (r"^ln_final", "text_model.final_layer_norm"),
    (r"^visual\.transformer\.resblocks", "vision_model.encoder.layers"),
    (r"^transformer\.resblocks", "text_model.encoder.layers"),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^text_projection$", "text_projection.weight"),
]
"""open_clip's names -> transformers' names, but for the joint query, key and value"""


def from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of an open_clip CLIP under the names, and in the shapes, of transformers' CLIPModel."""
    kept = {key: tensor for key, tensor in tensors.items() if not key.endswith("attn_mask")}
    result = {}
    for key, tensor in renamed(kept, RULES).items():
        before, joint, kind = key.partition(".attn.in_proj_")
        if joint:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                result[f"{before}.self_attn.{part}_proj.{kind}"] = piece
        else:
            result[key] = tensor.T if key.endswith("_projection.weight") else tensor
    return result


def config_of(tensors: Mapping[str, Tensor], end: int) -> CLIPConfig:
    """The configuration that the shapes of an open_clip checkpoint tell.

    Args:
        end: id of the end-of-text token, where text is pooled.
    """
    words, places = tensors["token_embedding.weight"].shape, tensors["positional_embedding"].shape
    width, _, patch, _ = tensors["visual.conv1.weight"].shape
    side = round((len(tensors["visual.positional_embedding"]) - 1) ** 0.5)
    text = {
        "vocab_size": words[0],
        "hidden_size": words[1],
        "intermediate_size": len(tensors["transformer.resblocks.0.mlp.c_fc.weight"]),
        "num_hidden_layers": depth(tensors, "transformer.resblocks"),
        "max_position_embeddings": places[0],
        "eos_token_id": end,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    vision = {
        "hidden_size": width,
        "intermediate_size": len(tensors["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
        "num_hidden_layers": depth(tensors, "visual.transformer.resblocks"),
        "image_size": side * patch,
        "patch_size": patch,
    }
    shared = {"num_attention_heads": HEADS, "hidden_act": "gelu", "projection_dim": tensors["text_projection"].shape[1]}
    return CLIPConfig(
        text_config=text | shared, vision_config=vision | shared, projection_dim=shared["projection_dim"]
    )


class HpsV2:
    """HPS v2.1 (or, by its file, 2.0)."""

    def __init__(
        self,
        path: str | Path = "xswu/HPSv2/HPS_v2.1_compressed.pt",
        processor: str | Path = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        dtype: str | None = None,
        device: Any = "cpu",
    ) -> None:
        """
        Args:
            path: file of the checkpoint, local or owner/repository/file of the hub.
            processor: folder or hub id of CLIP's tokenizer.
            dtype: fp32, bf16 or fp16; None takes bf16 on a GPU, fp32 on a CPU.
        """
        tensors = read_tensors("hpsv2", "path", path)
        for key in ("visual.conv1.weight", "transformer.resblocks.0.mlp.c_fc.weight", "text_projection"):
            needed("hpsv2", "path", path, tensors, key)
        words = len(needed("hpsv2", "path", path, tensors, "token_embedding.weight"))
        tokenizer = tokenizer_of(CLIPTokenizer, "hpsv2", "processor", processor, words)
        model = CLIPModel(config_of(tensors, tokenizer.eos_token_id))
        install(model, from_open_clip(tensors), option("hpsv2", "path"), path)
        self.clip = ClipEncoder(frozen(model, dtype_of("hpsv2", dtype, device), device), tokenizer, letterbox_pixels)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """uint8 (B, 3, H, W) and B prompts -> fp32 (B,)."""
        check_images(images, prompts)
        return self.clip.cosine(images, [cleaned(prompt.text) for prompt in prompts])


def cleaned(text: str) -> str:
    """A prompt as open_clip's tokenizer sees it: HTML entities resolved twice, white space made plain."""
    return " ".join(html.unescape(html.unescape(text)).split())
