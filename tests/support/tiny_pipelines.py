"""Pipelines of every supported class with a few thousand random weights each, built without any hub.

`save(name, folder)` writes one as `save_pretrained` does, so that plain diffusers and tempflow load the same files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from tempflow.settings.fields import ModelConfig, SampleConfig

TEXTS = [
    "a seven at the top left and a three at the bottom right",
    "three fours",
    "a one above a nine, drawn with great care on a wide blue wall by an old sailor",
]
"""Prompts of different lengths."""

QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
MISTRAL_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {% for part in message.content %}{{ part.text }} {% endfor %}"
    "{% endfor %}"
)
WIDTH = 16


def clip_tokenizer() -> transformers.CLIPTokenizer:
    """A CLIP tokenizer that knows single letters."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    numbered = {token: number for number, token in enumerate(sorted(vocabulary))}
    return transformers.CLIPTokenizer(vocab=numbered, merges=[], model_max_length=80)


def t5_tokenizer() -> transformers.T5TokenizerFast:
    words = sorted({word for text in TEXTS for word in text.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((f"▁{word}", -1.0) for word in words)]
    return transformers.T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=64)


def qwen_tokenizer(corpus: Sequence[str]) -> transformers.Qwen2Tokenizer:
    """A byte-level tokenizer whose merges build the words of `corpus` letter by letter."""
    splitter = transformers.Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    words = sorted({word for text in corpus for word, _ in splitter.pre_tokenize_str(text)})
    merges = list(dict.fromkeys((word[:end], word[end]) for word in words for end in range(1, len(word))))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in merges)]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = QWEN_TEMPLATE
    return tokenizer


def mistral_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A word-level tokenizer with a chat template, in place of FLUX.2-dev's processor, which needs torchvision."""
    words = ["<pad>", "<unk>", "[IMG]", *sorted({word for text in TEXTS for word in text.split()})]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", padding_side="left"
    )
    tokenizer.chat_template = MISTRAL_TEMPLATE
    return tokenizer


def clip_encoder(kind: type, tokenizer: transformers.CLIPTokenizer) -> nn.Module:
    return kind(transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=WIDTH, projection_dim=WIDTH,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip


def t5_encoder(tokenizer: transformers.T5TokenizerFast) -> nn.Module:
    return transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=len(tokenizer), d_model=2 * WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2,
    ))  # fmt: skip


def language_model(vocabulary: int, layers: int, width: int = WIDTH) -> dict:
    """Settings that Qwen's and Mistral's decoders share."""
    sizes = {"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": width, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 512}


def autoencoder(kind: type = diffusers.AutoencoderKL, **options) -> nn.Module:
    """To half the side, 4 channels."""
    return kind(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=2, **options,
    )  # fmt: skip


def kl_autoencoder() -> nn.Module:
    return autoencoder(scaling_factor=0.6, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False)


def dynamic_scheduler(**options) -> diffusers.FlowMatchEulerDiscreteScheduler:
    """The shift depends on the image size."""
    return diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096,
        **options,
    )  # fmt: skip


def sd3() -> diffusers.DiffusionPipeline:
    """With the second attention of SD3.5 medium in its first block."""
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    kind = transformers.CLIPTextModelWithProjection
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=2 * WIDTH, caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH, pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=kl_autoencoder(),
        text_encoder=clip_encoder(kind, clip), tokenizer=clip, text_encoder_2=clip_encoder(kind, clip),
        tokenizer_2=clip_tokenizer(), text_encoder_3=t5_encoder(t5), tokenizer_3=t5,
    )  # fmt: skip


def flux() -> diffusers.DiffusionPipeline:
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=2 * WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return diffusers.FluxPipeline(
        transformer=transformer, scheduler=dynamic_scheduler(), vae=kl_autoencoder(), tokenizer=clip, tokenizer_2=t5,
        text_encoder=clip_encoder(transformers.CLIPTextModel, clip), text_encoder_2=t5_encoder(t5),
    )  # fmt: skip


def qwen_image() -> diffusers.DiffusionPipeline:
    template = "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the objects and background:"  # noqa: E501
    tokenizer = qwen_tokenizer([template, *TEXTS])
    text_encoder = transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(
        text_config={**language_model(len(tokenizer), 2), "rope_parameters": {
            "rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}},
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH,
                       "fullatt_block_indexes": [0]},
    ))  # fmt: skip
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[-0.7, 0.3, 0.1, 0.5], latents_std=[1.4, 0.8, 2.1, 1.1],
    )  # fmt: skip
    return diffusers.QwenImagePipeline(
        transformer=transformer, scheduler=dynamic_scheduler(), vae=vae, text_encoder=text_encoder, tokenizer=tokenizer
    )


def flux2_transformer(guidance_embeds: bool) -> nn.Module:
    return diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * 8, timestep_guidance_channels=16, mlp_ratio=2.0, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )  # fmt: skip


def flux2_autoencoder() -> nn.Module:
    vae = autoencoder(diffusers.AutoencoderKLFlux2)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


def flux2() -> diffusers.DiffusionPipeline:
    tokenizer = mistral_tokenizer()
    text_encoder = transformers.Mistral3ForConditionalGeneration(transformers.Mistral3Config(
        text_config={"model_type": "mistral", **language_model(len(tokenizer), 31, 8)}, image_token_index=2,
        vision_config={"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                       "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "head_dim": 8},
    ))  # fmt: skip
    return diffusers.Flux2Pipeline(
        transformer=flux2_transformer(True), scheduler=dynamic_scheduler(), vae=flux2_autoencoder(),
        text_encoder=text_encoder, tokenizer=tokenizer,
    )  # fmt: skip


def flux2_klein() -> diffusers.DiffusionPipeline:
    """The base model, not distilled."""
    tokenizer = qwen_tokenizer(["user\n", "assistant\n", *TEXTS])
    text_encoder = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**language_model(len(tokenizer), 28, 8)))
    return diffusers.Flux2KleinPipeline(
        transformer=flux2_transformer(False), scheduler=dynamic_scheduler(), vae=flux2_autoencoder(),
        text_encoder=text_encoder, tokenizer=tokenizer, is_distilled=False,
    )  # fmt: skip


def z_image() -> diffusers.DiffusionPipeline:
    tokenizer = qwen_tokenizer(["user\n", "assistant\n", *TEXTS[:2]])  # of the third text, words fall to letters
    text_encoder = transformers.Qwen3Model(transformers.Qwen3Config(**language_model(len(tokenizer), 3)))
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6], axes_lens=[256, 32, 32],
    )  # fmt: skip
    nn.init.normal_(transformer.x_pad_token)
    nn.init.normal_(transformer.cap_pad_token)
    return diffusers.ZImagePipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=kl_autoencoder(),
        text_encoder=text_encoder, tokenizer=tokenizer,
    )  # fmt: skip


BUILDERS = {"sd3": sd3, "flux": flux, "qwen_image": qwen_image, "flux2": flux2, "flux2_klein": flux2_klein,
            "z_image": z_image}  # fmt: skip
TEXT_TOKENS = {"sd3": 32, "flux": 32, "qwen_image": 48, "flux2": 96, "flux2_klein": 64, "z_image": 96}

NONE = {"z_image": 0.0}
"""The guidance that means none, where it is not 1."""

SIZE = {"height": 16, "width": 24}


def model_config(folder: Path, name: str, **changes) -> ModelConfig:
    return ModelConfig(**{"path": str(folder), "text_tokens": TEXT_TOKENS[name], "lora_rank": 4, "lora_alpha": 8,
                          **changes})  # fmt: skip


def sample_config(name: str, guidance: float | None = None, size: dict[str, int] = SIZE) -> SampleConfig:
    return SampleConfig(guidance=NONE.get(name, 1.0) if guidance is None else guidance, **size)


def save(name: str, folder: Path) -> Path:
    """Builds one and writes it; the same weights every time."""
    torch.manual_seed(0)
    BUILDERS[name]().save_pretrained(folder)
    return folder
