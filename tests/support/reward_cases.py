"""Small things that the tests of scorers share: pictures, tokenizers, random weights, a CLIP written out by hand."""

from __future__ import annotations

import math
import string
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from tempflow.rewards.scorers.hpsv2 import HEADS, config_of, from_open_clip

CLIP_SIDE, WIDTH, WORDS = 24, 32, 2 * len(string.ascii_lowercase) + 2
"""side of the tiny CLIP's pictures, its width, the size of its vocabulary"""


def pictures(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth random uint8 (count, 3, height, width) with some hard edges."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 5, generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    noise = torch.rand(count, 3, height, width, generator=generator)
    edges = (torch.arange(width) // 7 % 2).float() * 0.3
    return ((smooth * 0.6 + noise * 0.1 + edges).clamp(0, 1) * 255).round().to(torch.uint8)


def triangle(x: Tensor) -> Tensor:
    """The bilinear filter."""
    return (1 - x.abs()).clamp(min=0)


def cubic(x: Tensor) -> Tensor:
    """The bicubic filter with a = -1/2."""
    x = x.abs()
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def filtered(images: Tensor, shape: tuple[int, int], kernel: Callable[[Tensor], Tensor]) -> Tensor:
    """fp64 (B, C, *shape): each new pixel the weighted mean of old ones, the filter as wide as the scale asks."""
    sides = []
    for old, new in zip(images.shape[-2:], shape, strict=True):
        scale = old / new
        centres, places = (torch.arange(new).double() + 0.5) * scale, torch.arange(old).double() + 0.5
        weights = kernel((places - centres[:, None]) / max(scale, 1))
        sides.append(weights / weights.sum(1, keepdim=True))
    return sides[0] @ images.double() @ sides[1].T


def for_clip(levels: Tensor) -> Tensor:
    """fp32 of levels 0 to 255, with CLIP's published mean and deviation of the channels."""
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return ((levels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(deviation).view(3, 1, 1)).float()


def boxed(images: Tensor, size: int) -> Tensor:
    """fp32 (B, 3, size, size) as HPSv2 sees pictures: longer side to `size`, what is left over black, the odd line of
    it below or on the right.
    """
    height, width = (round(side * size / max(images.shape[-2:])) for side in images.shape[-2:])
    levels = torch.zeros(len(images), 3, size, size, dtype=torch.float64)
    top, left = (size - height) // 2, (size - width) // 2
    levels[..., top : top + height, left : left + width] = filtered(images, (height, width), cubic)
    return for_clip(levels)


def clip_tokenizer() -> CLIPTokenizer:
    """Letters as tokens, with and without the mark of a word's end."""
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    names = [*letters, "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={name: place for place, name in enumerate(names)}, merges=[], model_max_length=16)


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int, size: float = 0.2) -> dict[str, Tensor]:
    """Normal tensors of the given shapes; scales of layer norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {key: torch.randn(shape, generator=generator) * size for key, shape in shapes.items()}
    for key in tensors:
        if ("ln_" in key or "norm" in key.lower()) and key.endswith("weight"):
            tensors[key] += 1
    return tensors


def _tower(prefix: str, layers: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        block = f"{prefix}.resblocks.{layer}"
        shapes |= {f"{block}.ln_{n}.{kind}": (WIDTH,) for n in (1, 2) for kind in ("weight", "bias")}
        shapes |= {f"{block}.attn.in_proj_weight": (3 * WIDTH, WIDTH), f"{block}.attn.in_proj_bias": (3 * WIDTH,)}
        shapes |= {f"{block}.attn.out_proj.weight": (WIDTH, WIDTH), f"{block}.attn.out_proj.bias": (WIDTH,)}
        shapes |= {f"{block}.mlp.c_fc.weight": (48, WIDTH), f"{block}.mlp.c_fc.bias": (48,)}
        shapes |= {f"{block}.mlp.c_proj.weight": (WIDTH, 48), f"{block}.mlp.c_proj.bias": (WIDTH,)}
    return shapes


def open_clip_tensors(seed: int = 0) -> dict[str, Tensor]:
    """Random weights of a small CLIP under open_clip's names: 3 picture layers, 2 text layers."""
    shapes = {
        "visual.class_embedding": (WIDTH,),
        "visual.positional_embedding": (10, WIDTH),
        "visual.proj": (WIDTH, 20),
        "visual.conv1.weight": (WIDTH, 3, 8, 8),
        "positional_embedding": (16, WIDTH),
        "token_embedding.weight": (WORDS, WIDTH),
        "text_projection": (WIDTH, 20),
        "logit_scale": (),
    }
    shapes |= {f"{name}.{kind}": (WIDTH,) for name in ("visual.ln_pre", "visual.ln_post", "ln_final")
               for kind in ("weight", "bias")}  # fmt: skip
    tensors = random_tensors(shapes | _tower("visual.transformer", 3) | _tower("transformer", 2), seed)
    return tensors | {"logit_scale": torch.tensor(3.0)}


def _norm(x: Tensor, weights: dict[str, Tensor], name: str, eps: float = 1e-5) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, allowed: Tensor | None = None) -> Tensor:
    """Softmax attention of (B, L, D) queries, head by head; `allowed` (..., L, M) bool."""
    parts = []
    for query, key, value in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        logits = query @ key.mT / math.sqrt(query.shape[-1])
        if allowed is not None:
            logits = logits.masked_fill(~allowed, float("-inf"))
        parts.append(logits.softmax(-1) @ value)
    return torch.cat(parts, -1)


def _blocks(x: Tensor, weights: dict[str, Tensor], prefix: str, layers: int, allowed: Tensor | None) -> Tensor:
    for layer in range(layers):
        name = f"{prefix}.resblocks.{layer}"
        y = _norm(x, weights, f"{name}.ln_1")
        joint = y @ weights[f"{name}.attn.in_proj_weight"].T + weights[f"{name}.attn.in_proj_bias"]
        x = x + _linear(attention(*joint.chunk(3, -1), HEADS, allowed), weights, f"{name}.attn.out_proj")
        y = _linear(_norm(x, weights, f"{name}.ln_2"), weights, f"{name}.mlp.c_fc")
        y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
        x = x + _linear(y, weights, f"{name}.mlp.c_proj")
    return x


def open_clip_image(pixels: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Unit vectors of normalised pixels, as open_clip's vision transformer defines them."""
    kernel = weights["visual.conv1.weight"]
    patches = F.unfold(pixels, kernel.shape[-1], stride=kernel.shape[-1]).mT @ kernel.flatten(1).T
    first = weights["visual.class_embedding"].expand(len(pixels), 1, -1)
    x = torch.cat([first, patches], 1) + weights["visual.positional_embedding"]
    x = _blocks(_norm(x, weights, "visual.ln_pre"), weights, "visual.transformer", 3, None)
    return F.normalize(_norm(x[:, 0], weights, "visual.ln_post") @ weights["visual.proj"], dim=-1)


def open_clip_text(texts: list[str], weights: dict[str, Tensor]) -> Tensor:
    """Unit vectors of texts in lower-case words, as open_clip's text transformer defines them: padded with zeros."""
    letters = string.ascii_lowercase
    rows = []
    for text in texts:
        words = text.split()
        inner = [letters.index(c) + 26 * (place == len(word) - 1) for word in words for place, c in enumerate(word)]
        tokens = [WORDS - 2, *inner[:14], WORDS - 1]
        rows.append(tokens + [0] * (16 - len(tokens)))
    tokens = torch.tensor(rows)
    x = weights["token_embedding.weight"][tokens] + weights["positional_embedding"]
    x = _blocks(x, weights, "transformer", 2, torch.ones(16, 16).tril().bool())
    x = _norm(x, weights, "ln_final")[torch.arange(len(texts)), tokens.argmax(1)]
    return F.normalize(x @ weights["text_projection"], dim=-1)


def clip_folder(folder: Path, weights: dict[str, Tensor]) -> Path:
    """A folder of transformers with a tiny CLIP and its tokenizer."""
    tokenizer = clip_tokenizer()
    model = CLIPModel(config_of(weights, tokenizer.eos_token_id))
    model.load_state_dict(from_open_clip(weights))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
