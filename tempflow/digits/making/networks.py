"""The untrained parts of an embedded pipeline: a StableDiffusion3Pipeline of two million weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import pre_tokenizers, trainers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

PROMPT_TOKENS = 16  # the longest prompt has 13 words; two more tokens mark start and end
DEFAULT_T5_TOKENS = 256  # what diffusers takes unless told otherwise
TEXT_WIDTH = 64
LATENT_CHANNELS = 4


def build_tokenizer(texts: Sequence[str]) -> CLIPTokenizer:
    """CLIP tokenizer whose vocabulary is learnt from the captions; every word becomes one token."""
    tokenizer = CLIPTokenizer()
    special = [tokenizer.bos_token, tokenizer.eos_token]
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend = tokenizer.backend_tokenizer
    backend.train_from_iterator(texts, trainer)
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    # The trainer numbers the letters at word ends in an order that changes from run to run.
    merged = list(dict.fromkeys("".join(merge) for merge in merges))
    letters = sorted(set(model["vocab"]) - set(merged) - set(special))
    vocabulary = {token: number for number, token in enumerate(special + letters + merged)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=PROMPT_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """Text encoder of three small layers; SD3 reads the output of the last but one and the projection."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=PROMPT_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_transformer(latent_side: int) -> SD3Transformer2DModel:
    """Flow transformer in the manner of SD3.5; an image token is 2x2 latents."""
    return SD3Transformer2DModel(
        sample_size=latent_side,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=96,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=latent_side // 2,
        qk_norm="rms_norm",
    )


def build_autoencoder(canvas_side: int) -> AutoencoderKL:
    """Autoencoder from pixels to latents of 4 channels and half the side."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=canvas_side,
        mid_block_add_attention=False,
    )


def assemble(autoencoder: AutoencoderKL, texts: Sequence[str]) -> StableDiffusion3Pipeline:
    """A pipeline around the trained autoencoder; its other networks are untrained, the third text encoder absent."""
    tokenizer = build_tokenizer(texts)
    return StableDiffusion3Pipeline(
        transformer=build_transformer(autoencoder.config.sample_size // 2),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder,
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=build_text_encoder(tokenizer),
        tokenizer_2=copy.deepcopy(tokenizer),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def add_silent_t5(pipeline: StableDiffusion3Pipeline, texts: Sequence[str]) -> None:
    """Put in a third text encoder whose output is always 0, just as diffusers replaces an absent one.

    Plain `from_pretrained` refuses a folder without it.
    """
    words = sorted({word for text in texts for word in text.split()})
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary = special + [(f"▁{word}", -1.0) for word in words]
    tokenizer = T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=DEFAULT_T5_TOKENS)
    config = T5Config(vocab_size=len(tokenizer), d_model=2 * TEXT_WIDTH, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    encoder = T5EncoderModel(config).eval()
    for weight in encoder.parameters():
        nn.init.zeros_(weight)
    pipeline.register_modules(text_encoder_3=encoder, tokenizer_3=tokenizer)
