"""Real architectures without their weights: published configurations, random numbers, no hub.

`make_pipeline` writes a diffusers pipeline folder that `tempflow.models.load` reads like any other. Text
encoders are left out: every text is encoded once and kept, so they cost a run nothing; `random_texts` puts random
embeddings of the right shapes in their place. Random weights cost what trained ones cost, but they make no pictures:
rank correlations of rewards under approximations are only meaningful with the trained digits pipeline.

Sources: `config.json` of stabilityai/stable-diffusion-3.5-medium and black-forest-labs/FLUX.1-dev.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from tempflow.models.load import FAMILIES

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

SD35_MEDIUM = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
    "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}  # fmt: skip
FLUX_DEV = {
    "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
VAE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 16, "layers_per_block": 2, "norm_num_groups": 32,
    "block_out_channels": (128, 256, 512, 512), "act_fn": "silu", "sample_size": 1024, "force_upcast": True,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
SMALL_VAE = VAE | {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2}
SMALL_SD3 = SD35_MEDIUM | {
    "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 32,
    "caption_projection_dim": 16, "pooled_projection_dim": 16, "dual_attention_layers": (0,), "pos_embed_max_size": 16,
}  # fmt: skip
SMALL_FLUX = FLUX_DEV | {
    "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 32, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
SD3_SHIFT = {"shift": 3.0, "num_train_timesteps": 1000}
FLUX_SHIFT = {
    "shift": 3.0, "num_train_timesteps": 1000, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15,
    "base_image_seq_len": 256, "max_image_seq_len": 4096,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A pipeline to be made, and the settings under which its released recipe runs."""

    name: str
    pipeline: str
    """diffusers class"""
    transformer_class: str
    transformer: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    text_tokens: int
    """tokens that enter the transformer"""
    pixels: int
    settings: dict[str, Any] = field(default_factory=dict)
    """`section.field` -> value, on top of COMMON"""
    official_weights: str = "fp32"
    """of the released code's transformer"""

    @property
    def image_tokens(self) -> int:
        return (self.pixels // 16) ** 2


COMMON = {
    "sample.steps": 10, "explore.forks": "all", "explore.prompts": 1, "explore.noises": 4, "explore.siblings": 6,
    "objective.kl": 0.001, "learn.iterations": 1_000_000,
}  # fmt: skip
"""The released recipe: T = 10, N = 4, K = 6, KL on."""

SD3_SETTINGS = {
    "sample.guidance": 4.5, "sample.noise_level": 0.7, "model.text_tokens": 128, "learn.rows": 4,
    "tails.rows": 24, "reward.rows": 24,
}  # fmt: skip
FLUX_SETTINGS = {
    "sample.guidance": 3.5, "sample.noise_level": 0.9, "model.text_tokens": 512, "learn.rows": 2, "explore.noises": 2,
    "tails.rows": 12, "reward.rows": 12, "model.gradient_checkpointing": True,
}  # fmt: skip


def _sd3(name: str, transformer: dict, vae: dict, pixels: int, **settings: Any) -> Architecture:
    vae = vae | {"scaling_factor": 1.5305, "shift_factor": 0.0609}
    return Architecture(name, "StableDiffusion3Pipeline", "SD3Transformer2DModel", transformer, vae, SD3_SHIFT,
                        77 + 128, pixels, SD3_SETTINGS | settings)  # fmt: skip


def _flux(name: str, transformer: dict, vae: dict, pixels: int, **settings: Any) -> Architecture:
    vae = vae | {"scaling_factor": 0.3611, "shift_factor": 0.1159}
    return Architecture(name, "FluxPipeline", "FluxTransformer2DModel", transformer, vae, FLUX_SHIFT, 512, pixels,
                        FLUX_SETTINGS | settings, official_weights="bf16")  # fmt: skip


ARCHITECTURES = {
    made.name: made
    for made in (
        _sd3("sd35-medium-512", SD35_MEDIUM, VAE, 512),
        _flux("flux-dev-512", FLUX_DEV, VAE, 512),
        _flux("flux-dev-1024", FLUX_DEV, VAE, 1024, **{"explore.noises": 1, "tails.rows": 6, "reward.rows": 6}),
        _sd3("small-sd3", SMALL_SD3, SMALL_VAE, 64),
        _flux("small-flux", SMALL_FLUX, SMALL_VAE, 64),
    )
}
"""small-*: the same classes in miniature, for trying the benchmark without a GPU; their speeds say nothing."""


def make_pipeline(architecture: Architecture, folder: Path, device: torch.device, dtype: str) -> Path:
    """Writes the pipeline with random weights, unless it is there already."""
    if (folder / "model_index.json").is_file():
        return folder
    torch.manual_seed(0)
    parts = {
        "transformer": (architecture.transformer_class, architecture.transformer),
        "vae": ("AutoencoderKL", architecture.vae),
    }
    for name, (class_name, config) in parts.items():
        with default_dtype(DTYPES[dtype]), torch.device(device):
            part = getattr(diffusers, class_name)(**config)
        part.save_pretrained(folder / name)
        del part
    diffusers.FlowMatchEulerDiscreteScheduler(**architecture.scheduler).save_pretrained(folder / "scheduler")
    index = {"_class_name": architecture.pipeline, "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
             "transformer": ["diffusers", architecture.transformer_class], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {part: [None, None] for part in TEXT_PARTS[architecture.pipeline]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def make_light_decoder(vae: Mapping[str, Any], folder: Path) -> Path:
    """Writes an AutoencoderTiny (the shape of TAESD) for the latents of `vae`, with random weights."""
    if (folder / "config.json").is_file():
        return folder
    stages = len(vae["block_out_channels"])
    with torch.random.fork_rng(devices=()):
        made = diffusers.AutoencoderTiny(
            latent_channels=vae["latent_channels"], encoder_block_out_channels=(64,) * stages,
            decoder_block_out_channels=(64,) * stages, num_encoder_blocks=(1, *(3,) * (stages - 1)),
            num_decoder_blocks=(*(3,) * (stages - 1), 1),
        )  # fmt: skip
    made.save_pretrained(folder)
    return folder


TEXT_PARTS = {
    "StableDiffusion3Pipeline": [f"{part}{suffix}" for part in ("text_encoder", "tokenizer") for suffix in
                                 ("", "_2", "_3")],
    "FluxPipeline": [f"{part}{suffix}" for part in ("text_encoder", "tokenizer") for suffix in ("", "_2")],
}  # fmt: skip


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within this context new parameters have that type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def random_texts(architecture: Architecture) -> Iterator[None]:
    """Within this context the pipeline needs no text encoders: `encode_prompt` gives random embeddings, a function of
    the text."""
    pipeline, family = getattr(diffusers, architecture.pipeline), FAMILIES[architecture.pipeline]
    needed, family.optional_parts = family.optional_parts, tuple(TEXT_PARTS[architecture.pipeline])
    before, config = pipeline.encode_prompt, architecture.transformer
    shapes = (architecture.text_tokens, config["joint_attention_dim"]), (config["pooled_projection_dim"],)

    def rows(texts: Sequence[str], shape: tuple[int, ...], device: Any) -> Tensor:
        made = [torch.randn(shape, generator=torch.Generator().manual_seed(sum(text.encode()))) for text in texts]
        return torch.stack(made).to(device)

    def sd3(self, prompt, *_, device=None, **options):
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        given, blank = ([rows(words, shape, device) for shape in shapes] for words in (texts, [""] * len(texts)))
        return given[0], blank[0], given[1], blank[1]

    def flux(self, prompt, *_, device=None, **options):
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        embeds, pooled = (rows(texts, shape, device) for shape in shapes)
        return embeds, pooled, torch.zeros(shapes[0][0], 3, device=device)

    pipeline.encode_prompt = {"StableDiffusion3Pipeline": sd3, "FluxPipeline": flux}[architecture.pipeline]
    try:
        yield
    finally:
        pipeline.encode_prompt, family.optional_parts = before, needed
