"""Configurations of published models, as their repositories have them, in folders without weights.

Numbers: the models' papers and diffusers' conversion scripts; what is not named has the classes' defaults.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Part = tuple[str, str, dict[str, Any]]
"""library, class, configuration"""

SCHEDULER: Part = ("diffusers", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
DYNAMIC: Part = ("diffusers", "FlowMatchEulerDiscreteScheduler", {
    "use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
    "max_image_seq_len": 4096})  # fmt: skip


def clip(cls: str, width: int, layers: int, heads: int) -> Part:
    return ("transformers", cls, {
        "model_type": "clip_text_model", "hidden_size": width, "intermediate_size": 4 * width, "vocab_size": 49408,
        "num_hidden_layers": layers, "num_attention_heads": heads, "projection_dim": width,
        "max_position_embeddings": 77})  # fmt: skip


T5_XXL: Part = ("transformers", "T5EncoderModel", {
    "model_type": "t5", "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "vocab_size": 32128, "feed_forward_proj": "gated-gelu"})  # fmt: skip


def kl_decoder(scaling: float, shift: float) -> Part:
    return ("diffusers", "AutoencoderKL", {
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16, "sample_size": 1024,
        "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": scaling, "shift_factor": shift,
    })  # fmt: skip


def sd3(layers: int, heads: int, positions: int, dual: int) -> dict[str, Part]:
    return {
        "transformer": ("diffusers", "SD3Transformer2DModel", {
            "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": layers,
            "attention_head_dim": 64, "num_attention_heads": heads, "joint_attention_dim": 4096,
            "caption_projection_dim": 64 * heads, "pooled_projection_dim": 2048, "pos_embed_max_size": positions,
            "qk_norm": "rms_norm", "dual_attention_layers": list(range(dual))}),
        "scheduler": SCHEDULER,
        "vae": kl_decoder(1.5305, 0.0609),
        "text_encoder": clip("CLIPTextModelWithProjection", 768, 12, 12),
        "text_encoder_2": clip("CLIPTextModelWithProjection", 1280, 32, 20),
        "text_encoder_3": T5_XXL,
        "tokenizer": ("transformers", "CLIPTokenizer", {}),
        "tokenizer_2": ("transformers", "CLIPTokenizer", {}),
        "tokenizer_3": ("transformers", "T5TokenizerFast", {}),
    }  # fmt: skip


def flux() -> dict[str, Part]:
    return {
        "transformer": ("diffusers", "FluxTransformer2DModel", {
            "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
            "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
            "guidance_embeds": True}),
        "scheduler": DYNAMIC,
        "vae": kl_decoder(0.3611, 0.1159),
        "text_encoder": clip("CLIPTextModel", 768, 12, 12),
        "text_encoder_2": T5_XXL,
        "tokenizer": ("transformers", "CLIPTokenizer", {}),
        "tokenizer_2": ("transformers", "T5TokenizerFast", {}),
    }  # fmt: skip


def decoder_lm(cls: str, kind: str, width: int, inner: int, layers: int, heads: int, kv: int, vocab: int) -> Part:
    return ("transformers", cls, {
        "model_type": kind, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": 128, "vocab_size": vocab})  # fmt: skip


QWEN3_4B = (2560, 9728, 36, 32, 8, 151936)
QWEN3_8B = (4096, 12288, 36, 32, 8, 151936)


def qwen_image() -> dict[str, Part]:
    text = dict(decoder_lm("", "qwen2_5_vl_text", 3584, 18944, 28, 28, 4, 152064)[2])
    return {
        "transformer": ("diffusers", "QwenImageTransformer2DModel", {
            "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 60, "attention_head_dim": 128,
            "num_attention_heads": 24, "joint_attention_dim": 3584}),
        "scheduler": DYNAMIC,
        "vae": ("diffusers", "AutoencoderKLQwenImage", {}),
        "text_encoder": ("transformers", "Qwen2_5_VLForConditionalGeneration", {
            "model_type": "qwen2_5_vl", "text_config": text, "vision_config": {
                "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
                "out_hidden_size": 3584}}),
        "tokenizer": ("transformers", "Qwen2Tokenizer", {}),
    }  # fmt: skip


def flux2(double: int, single: int, heads: int, width: int, text: Part, **options: Any) -> dict[str, Part]:
    return {
        "transformer": ("diffusers", "Flux2Transformer2DModel", {
            "patch_size": 1, "in_channels": 128, "num_layers": double, "num_single_layers": single,
            "attention_head_dim": 128, "num_attention_heads": heads, "joint_attention_dim": width, **options}),
        "scheduler": DYNAMIC,
        "vae": ("diffusers", "AutoencoderKLFlux2", {}),
        "text_encoder": text,
        "tokenizer": ("transformers", "Qwen2Tokenizer", {}),
    }  # fmt: skip


def mistral_small() -> Part:
    text = decoder_lm("", "mistral", 5120, 32768, 40, 32, 8, 131072)[2]
    return ("transformers", "Mistral3ForConditionalGeneration", {
        "model_type": "mistral3", "text_config": text, "vision_config": {
            "model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "head_dim": 64}})  # fmt: skip


def z_image() -> dict[str, Part]:
    return {
        "transformer": ("diffusers", "ZImageTransformer2DModel", {}),
        "scheduler": SCHEDULER,
        "vae": kl_decoder(0.3611, 0.1159),
        "text_encoder": decoder_lm("Qwen3Model", "qwen3", *QWEN3_4B),
        "tokenizer": ("transformers", "Qwen2Tokenizer", {}),
    }


MODELS = {
    "sd35_medium": ("StableDiffusion3Pipeline", lambda: sd3(24, 24, 384, 13)),
    "sd35_large": ("StableDiffusion3Pipeline", lambda: sd3(38, 38, 192, 0)),
    "flux1_dev": ("FluxPipeline", flux),
    "qwen_image": ("QwenImagePipeline", qwen_image),
    "flux2_dev": ("Flux2Pipeline", lambda: flux2(8, 48, 48, 15360, mistral_small())),
    "flux2_klein_4b": ("Flux2KleinPipeline", lambda: flux2(
        5, 20, 24, 7680, decoder_lm("Qwen3ForCausalLM", "qwen3", *QWEN3_4B), guidance_embeds=False)),
    "z_image": ("ZImagePipeline", z_image),
}  # fmt: skip


def write(name: str, folder: Path) -> Path:
    """The pipeline `name` of MODELS as a folder of configurations."""
    pipeline, parts = MODELS[name]
    index: dict[str, Any] = {"_class_name": pipeline}
    for part, (library, cls, config) in parts().items():
        index[part] = [library, cls]
        (folder / part).mkdir(parents=True)
        file = {"scheduler": "scheduler_config.json"}.get(part, "config.json")
        named = {"_class_name": cls} if library == "diffusers" else {}
        (folder / part / file).write_text(json.dumps(named | config))
    if pipeline == "Flux2KleinPipeline":
        index["is_distilled"] = False
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
