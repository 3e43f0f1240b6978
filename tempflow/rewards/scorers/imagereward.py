"""ImageReward: human preference of a picture for a prompt (arXiv 2304.05977).

Score: BLIP reads the prompt while looking at the picture, a stack of five linear layers turns its first token into
a number, standardised by the official mean and deviation; about -2 to 2. The official checkpoint is BLIP's own code;
its tensors are renamed to those of transformers' BLIP, which computes the same (tests/rewards/test_blip.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from tempflow.prompts import Prompt
from tempflow.rewards.parts.pixels import check_images, clip_pixels
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
from tempflow.rewards.scorers.aesthetic import Head

MEAN, STD = 0.16717362830052426, 1.0333394966054072
LENGTH = 35
VISION_HEADS, TEXT_HEADS = 16, 12
"""of ViT-L/16 and BERT-base; the sizes that the shapes of the tensors do not tell"""

RULES = [
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.", "vision.encoder.layers."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.", "head."),
]
"""BLIP's names -> those of `Reader`"""

UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
"""in the checkpoint, but not on the way to the score"""


class Reader(nn.Module):
    """Picture and tokens -> one number."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Sized as the shapes of an ImageReward checkpoint tell."""
        super().__init__()
        patches = tensors["blip.visual_encoder.patch_embed.proj.weight"].shape
        side = round((tensors["blip.visual_encoder.pos_embed"].shape[1] - 1) ** 0.5)
        words = tensors["blip.text_encoder.embeddings.word_embeddings.weight"].shape
        vision = BlipVisionConfig(
            hidden_size=patches[0],
            intermediate_size=len(tensors["blip.visual_encoder.blocks.0.mlp.fc1.weight"]),
            num_hidden_layers=depth(tensors, "blip.visual_encoder.blocks"),
            num_attention_heads=VISION_HEADS,
            image_size=side * patches[2],
            patch_size=patches[2],
            layer_norm_eps=1e-6,
        )
        text = BlipTextConfig(
            vocab_size=words[0],
            hidden_size=words[1],
            encoder_hidden_size=patches[0],
            intermediate_size=len(tensors["blip.text_encoder.encoder.layer.0.intermediate.dense.weight"]),
            num_hidden_layers=depth(tensors, "blip.text_encoder.encoder.layer"),
            num_attention_heads=TEXT_HEADS,
            max_position_embeddings=len(tensors["blip.text_encoder.embeddings.position_embeddings.weight"]),
            layer_norm_eps=1e-12,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.vision, self.text = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)
        self.head = Head(words[1])
        self.size = side * patches[2]

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """(B, 3, size, size), (B, L), (B, L) -> fp32 (B,), standardised."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(input_ids=tokens, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        return (self.head(read[:, 0].float()) - MEAN) / STD


class ImageReward:
    """ImageReward v1.0."""

    def __init__(
        self,
        path: str | Path = "THUDM/ImageReward/ImageReward.pt",
        tokenizer: str | Path = "google-bert/bert-base-uncased",
        dtype: str | None = None,
        device: Any = "cpu",
    ) -> None:
        """
        Args:
            path: file of the checkpoint, local or owner/repository/file of the hub.
            tokenizer: folder or hub id of BERT's tokenizer.
            dtype: fp32, bf16 or fp16 of BLIP; None takes bf16 on a GPU, fp32 on a CPU. The linear layers are fp32.
        """
        tensors = read_tensors("imagereward", "path", path)
        for key in ("visual_encoder.patch_embed.proj.weight", "text_encoder.embeddings.word_embeddings.weight"):
            needed("imagereward", "path", path, tensors, f"blip.{key}")
        words = len(tensors["blip.text_encoder.embeddings.word_embeddings.weight"])
        self.tokenizer = tokenizer_of(BertTokenizer, "imagereward", "tokenizer", tokenizer, words, spare=2)
        reader = Reader(tensors)
        used = {key: tensor for key, tensor in tensors.items() if not key.startswith(UNUSED)}
        install(reader, renamed(used, RULES), option("imagereward", "path"), path)
        self.reader, self.device = reader, device
        frozen(reader.vision, dtype_of("imagereward", dtype, device), device)
        frozen(reader.text, dtype_of("imagereward", dtype, device), device)
        frozen(reader.head, torch.float32, device)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """uint8 (B, 3, H, W) and B prompts -> fp32 (B,)."""
        check_images(images, prompts)
        pixels = clip_pixels(images.to(self.device), self.reader.size, half_up=True)
        texts = [prompt.text for prompt in prompts]
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        mask = tokens["attention_mask"].to(self.device)
        return self.reader(pixels.to(self.reader.vision.dtype), tokens["input_ids"].to(self.device), mask)
