"""A tiny text-to-image pipeline for the digits benchmark, trained from nothing by flow matching."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import trange
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from tempflow.digits.canvas import BLANK, CANVAS_SIDE, CELLS, Grid, Renderer, classes_of
from tempflow.digits.captions import KINDS, Caption

PROMPT_TOKENS = 16  # the longest prompt has 13 words; two more tokens mark start and end
TEXT_WIDTH = 64
LATENT_CHANNELS = 4
LATENT_SIDE = CANVAS_SIDE // 2

# The pipeline shall follow a prompt only about half of the time, as a model does whose training
# captions come from the web: this share of the training pictures contradicts its caption.
WRONG_SHARES = {"single": 0.35, "pair": 0.35, "count": 0.35, "relation": 0.35, "blank": 0.35}
# The absent third text encoder is replaced by null tokens: as many as the caller's
# max_sequence_length. Most steps train with the cheap number, a few with the default of 256.
NULL_TOKENS = PROMPT_TOKENS
MANY_NULL_TOKENS = 256
MANY_NULL_TOKENS_EVERY = 40

# Reading a caption costs as much as drawing for it, so each one read serves several pictures.
PICTURES_PER_CAPTION = 4
AVERAGE_EVERY = 5


@dataclass(frozen=True)
class Budget:
    """How long to train: steps of the autoencoder and of the flow, and rows per flow step."""

    autoencoder_steps: int = 1200
    flow_steps: int = 4000
    flow_batch: int = 128


def build_tokenizer(captions: Sequence[Caption]) -> CLIPTokenizer:
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
    backend.train_from_iterator([caption.text for caption in captions], trainer)
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=PROMPT_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """Text encoder of two small layers; SD3 reads the output of the last but one and the projection."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=PROMPT_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_transformer() -> SD3Transformer2DModel:
    """Flow transformer in the manner of SD3.5 over 4x4 image tokens."""
    return SD3Transformer2DModel(
        sample_size=LATENT_SIDE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=96,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=LATENT_SIDE // 2,
        qk_norm="rms_norm",
    )


def build_autoencoder() -> AutoencoderKL:
    """Autoencoder from 16x16 pixels to 8x8 latents of 4 channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=CANVAS_SIDE,
        mid_block_add_attention=False,
    )


def to_signed(images: Tensor) -> Tensor:
    """Pictures uint8 (B, 3, H, W) as float32 with values -1 to 1."""
    return images.float() / 127.5 - 1


def random_classes(count: int, generator: torch.Generator) -> Tensor:
    """Random grids int64 (count, 4), every cell blank or a digit with equal chance."""
    digits = torch.randint(10, (count, CELLS), generator=generator)
    blank = torch.rand(count, CELLS, generator=generator) < 0.5
    return digits.masked_fill(blank, BLANK)


def train_autoencoder(draw: Renderer, steps: int, generator: torch.Generator) -> AutoencoderKL:
    """Train on random canvases, then set scaling and shift so that latents have mean 0 and deviation 1."""
    autoencoder = build_autoencoder().train()
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in trange(steps, desc="autoencoder", mininterval=2):
        pictures = to_signed(draw(random_classes(64, generator), generator))
        posterior = autoencoder.encode(pictures).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        restored = autoencoder.decode(posterior.mean + posterior.std * noise).sample
        loss = F.l1_loss(restored, pictures) + F.mse_loss(restored, pictures) + 2e-5 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    autoencoder.eval().requires_grad_(False)
    latents = autoencoder.encode(to_signed(draw(random_classes(2048, generator), generator))).latent_dist.mean
    autoencoder.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    return autoencoder


def encode_pictures(autoencoder: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Canvases uint8 (B, 3, 16, 16) as normalised latents float32 (B, 4, 8, 8)."""
    latents = autoencoder.encode(to_signed(pictures)).latent_dist.mean
    return (latents - autoencoder.config.shift_factor) * autoencoder.config.scaling_factor


def spoil_grid(grid: Grid, rng: random.Random) -> Grid:
    """Make one mistake: another digit, two cells swapped, or a digit too many or too few."""
    cells = list(grid)
    place = rng.randrange(CELLS)
    mistake = rng.random()
    if mistake < 0.35 and cells[place] is not None:
        cells[place] = rng.choice([digit for digit in range(10) if digit != cells[place]])
    elif mistake < 0.7:
        other = rng.randrange(CELLS)
        cells[place], cells[other] = cells[other], cells[place]
    else:
        cells[place] = rng.randrange(10) if cells[place] is None else None
    return tuple(cells)


def picture_grid(caption: Caption, rng: random.Random) -> Grid:
    """A grid to train on with the caption: most often one that satisfies it, sometimes a spoilt one."""
    grid = rng.choice(caption.grids)
    if rng.random() >= WRONG_SHARES[caption.kind]:
        return grid
    while grid in caption.grids:
        grid = spoil_grid(grid, rng)
    return grid


class CaptionSampler:
    """Draws batches of captions (all kinds alike) and grids for them."""

    def __init__(self, captions: Sequence[Caption], seed: int) -> None:
        self.rng = random.Random(seed)
        self.by_kind = [[item for item in captions if item.kind == kind] for kind in KINDS]

    def __call__(self, count: int) -> tuple[list[str], Tensor]:
        """Texts (count) and class numbers int64 (count * PICTURES_PER_CAPTION, 4)."""
        chosen = [self.rng.choice(self.rng.choice(self.by_kind)) for _ in range(count)]
        classes = [
            classes_of(picture_grid(caption, self.rng)) for caption in chosen for _ in range(PICTURES_PER_CAPTION)
        ]
        return [caption.text for caption in chosen], torch.tensor(classes)


def embed_text(pipeline: StableDiffusion3Pipeline, texts: list[str], null_tokens: int) -> tuple[Tensor, Tensor]:
    """Token embeddings (B, 16 + null_tokens, 128) and pooled embeddings (B, 128), with gradients."""
    embeds, _, pooled, _ = pipeline.encode_prompt(
        texts, None, None, do_classifier_free_guidance=False, max_sequence_length=null_tokens
    )
    return embeds, pooled


def flow_loss(pipeline: StableDiffusion3Pipeline, texts: list[str], latents: Tensor, null_tokens: int,
              generator: torch.Generator) -> Tensor:  # fmt: skip
    """Mean squared error of the velocity (noise - data) at logit-normal noise levels.

    The latents are as many per text for every text, in the order of the texts.
    """
    sigma = torch.sigmoid(0.3 + torch.randn(len(latents), generator=generator))
    noise = torch.randn(latents.shape, generator=generator)
    weight = sigma[:, None, None, None]
    repeats = len(latents) // len(texts)
    embeds, pooled = (part.repeat_interleave(repeats, 0) for part in embed_text(pipeline, texts, null_tokens))
    velocity = pipeline.transformer(
        hidden_states=(1 - weight) * latents + weight * noise,
        timestep=1000 * sigma,
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        return_dict=False,
    )[0]
    return F.mse_loss(velocity, noise - latents)


def trained_parts(pipeline: StableDiffusion3Pipeline) -> nn.ModuleList:
    """The networks that learn from captions."""
    return nn.ModuleList([pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2])


def assemble(autoencoder: AutoencoderKL, captions: Sequence[Caption]) -> StableDiffusion3Pipeline:
    """A pipeline around the trained autoencoder whose other networks are still untrained."""
    tokenizer = build_tokenizer(captions)
    return StableDiffusion3Pipeline(
        transformer=build_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder,
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=build_text_encoder(tokenizer),
        tokenizer_2=copy.deepcopy(tokenizer),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def train_pipeline(draw: Renderer, captions: Sequence[Caption], budget: Budget, seed: int) -> StableDiffusion3Pipeline:
    """Train the autoencoder, then text encoders and transformer together; returns the averaged weights."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    autoencoder = train_autoencoder(draw, budget.autoencoder_steps, generator)
    pipeline = assemble(autoencoder, captions)
    learner = trained_parts(pipeline).train()
    average = copy.deepcopy(learner).requires_grad_(False)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-3, weight_decay=1e-3, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=budget.flow_steps, pct_start=0.05)
    sample = CaptionSampler(captions, seed)
    progress = trange(budget.flow_steps, desc="flow", mininterval=2)
    for step in progress:
        texts, classes = sample(budget.flow_batch // PICTURES_PER_CAPTION)
        latents = encode_pictures(autoencoder, draw(classes, generator))
        null_tokens = MANY_NULL_TOKENS if step % MANY_NULL_TOKENS_EVERY == 0 else NULL_TOKENS
        loss = flow_loss(pipeline, texts, latents, null_tokens, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % AVERAGE_EVERY == 0:
            update_average(average, learner, min(0.99, step / (step + 100)))
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    learner.load_state_dict(average.state_dict())
    learner.eval()
    return pipeline


@torch.no_grad()
def update_average(average: nn.Module, learner: nn.Module, keep: float) -> None:
    """Move the averaged weights towards the learner's."""
    for slow, fast in zip(average.parameters(), learner.parameters(), strict=True):
        slow.lerp_(fast, 1 - keep)
