"""A tiny text-to-image pipeline for an embedded benchmark, trained from nothing by flow matching."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from torch import Tensor, nn
from tqdm import trange

from tempflow.digits.canvas import BLANK, CANVAS_SIDE, CELLS, Grid, Renderer, classes_of
from tempflow.digits.captions import KINDS, Caption
from tempflow.digits.making.networks import DEFAULT_T5_TOKENS, PROMPT_TOKENS, add_silent_t5, assemble, build_autoencoder

# The pipeline shall follow a prompt only about half of the time, as a model does whose training captions come from
# the web: in the second stage this share of the pictures contradicts its caption.
WRONG_SHARE = 0.5
# Null tokens replace the silent third text encoder, as many as the caller's max_sequence_length.
# They carry nothing, so most of the training goes without them; at the end the model learns to
# ignore the cheap number of them and, in a few steps, diffusers' default number.
NO_NULL_TOKENS = (0,)
SOME_NULL_TOKENS = (PROMPT_TOKENS,) * 24 + (DEFAULT_T5_TOKENS,)  # by step, over and over

# Reading a caption costs as much as drawing for it, so each one read serves several pictures.
CAPTIONS_PER_STEP = 32
PICTURES_PER_CAPTION = 4
AVERAGE_EVERY = 5
NOISE_MEAN = 0.8  # of the logit of sigma: what is drawn where is decided at high noise
RATE = 1.5e-3
NOISY_RATE = 4e-4
KIND_WEIGHTS = {"single": 1, "pair": 2, "count": 1, "relation": 2, "blank": 1}  # harder kinds more often

Canvases = Callable[[int, torch.Generator], Tensor]
"""(how many) -> random canvases uint8 (B, 3, H, W)"""
Draw = Callable[[Tensor, torch.Generator], Tensor]
"""class numbers of cells int64 (B, cells) -> canvases that show them"""
Sampler = Callable[[int], tuple[list[str], Tensor]]
"""(how many) -> texts, and PICTURES_PER_CAPTION as many rows of class numbers to draw for them"""


@dataclass(frozen=True)
class Budget:
    """How long to train: steps of the autoencoder, and of the flow on true and on noisy captions."""

    autoencoder_steps: int = 800
    true_steps: int = 1500
    noisy_steps: int = 250


def to_signed(images: Tensor) -> Tensor:
    """Pictures uint8 (B, 3, H, W) as float32 with values -1 to 1."""
    return images.float() / 127.5 - 1


def random_classes(count: int, generator: torch.Generator) -> Tensor:
    """Random grids int64 (count, 4), every cell blank or a digit with equal chance."""
    digits = torch.randint(10, (count, CELLS), generator=generator)
    blank = torch.rand(count, CELLS, generator=generator) < 0.5
    return digits.masked_fill(blank, BLANK)


def random_canvases(draw: Renderer) -> Canvases:
    """Canvases of `random_classes`."""
    return lambda count, generator: draw(random_classes(count, generator), generator)


def train_autoencoder(canvases: Canvases, side: int, steps: int, seed: int) -> AutoencoderKL:
    """Train on random canvases, then set scaling and shift so that latents have mean 0 and deviation 1."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    autoencoder = build_autoencoder(side).train()
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in trange(steps, desc="autoencoder", mininterval=2):
        pictures = to_signed(canvases(64, generator))
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
    latents = autoencoder.encode(to_signed(canvases(2048, generator))).latent_dist.mean
    autoencoder.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    return autoencoder


def encode_pictures(autoencoder: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Canvases uint8 (B, 3, H, W) as normalised latents float32 (B, 4, H / 2, W / 2)."""
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


def picture_grid(caption: Caption, wrong_share: float, rng: random.Random) -> Grid:
    """A grid to train on with the caption: one that satisfies it, or by chance a spoilt one."""
    grid = rng.choice(caption.grids)
    if not wrong_share or rng.random() >= wrong_share:
        return grid
    while grid in caption.grids:
        grid = spoil_grid(grid, rng)
    return grid


class CaptionSampler:
    """Draws captions, harder kinds more often, and grids of which a share contradicts its caption."""

    def __init__(self, captions: Sequence[Caption], wrong_share: float, seed: int) -> None:
        self.rng, self.wrong_share = random.Random(seed), wrong_share
        self.by_kind = {kind: [item for item in captions if item.kind == kind] for kind in KINDS}

    def __call__(self, count: int) -> tuple[list[str], Tensor]:
        """Texts (count) and class numbers int64 (count * PICTURES_PER_CAPTION, 4)."""
        kinds = self.rng.choices(KINDS, [KIND_WEIGHTS[kind] for kind in KINDS], k=count)
        chosen = [self.rng.choice(self.by_kind[kind]) for kind in kinds]
        return [caption.text for caption in chosen], torch.tensor(
            [classes_of(picture_grid(caption, self.wrong_share, self.rng))
             for caption in chosen for _ in range(PICTURES_PER_CAPTION)]
        )


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
    sigma = torch.sigmoid(NOISE_MEAN + torch.randn(len(latents), generator=generator))
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


def train_pipeline(draw: Renderer, captions: Sequence[Caption], budget: Budget, seed: int) -> StableDiffusion3Pipeline:
    """Train the autoencoder, then text encoders and transformer: first on true, then on noisy captions."""
    autoencoder = train_autoencoder(random_canvases(draw), CANVAS_SIDE, budget.autoencoder_steps, seed)
    true, noisy = CaptionSampler(captions, 0.0, seed), CaptionSampler(captions, WRONG_SHARE, seed + 1)
    return train_to_draw(autoencoder, draw, [caption.text for caption in captions], (true, noisy), budget, seed)


def train_to_draw(autoencoder: AutoencoderKL, draw: Draw, texts: Sequence[str], samplers: tuple[Sampler, Sampler],
                  budget: Budget, seed: int) -> StableDiffusion3Pipeline:  # fmt: skip
    """Train text encoders and transformer around an autoencoder: first on true, then on noisy captions.

    Args:
        texts: every caption there may be.
    """
    torch.manual_seed(seed)
    pipeline, (true, noisy) = assemble(autoencoder, texts), samplers
    train_flow(pipeline, draw, true, budget.true_steps, RATE, NO_NULL_TOKENS, seed)
    train_flow(pipeline, draw, noisy, budget.noisy_steps, NOISY_RATE, SOME_NULL_TOKENS, seed + 1)
    add_silent_t5(pipeline, texts)
    return pipeline


def train_flow(pipeline: StableDiffusion3Pipeline, draw: Draw, sample: Sampler, steps: int, rate: float,
               null_tokens: Sequence[int], seed: int) -> None:  # fmt: skip
    """Train text encoders and transformer in place; at the end they hold averaged weights.

    The numbers of null tokens take turns, one a step.
    """
    generator = torch.Generator().manual_seed(seed)
    learner = nn.ModuleList([pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2]).train()
    average = copy.deepcopy(learner).requires_grad_(False)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=rate, weight_decay=1e-3, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    progress = trange(steps, desc="flow", mininterval=2)
    for step in progress:
        texts, classes = sample(CAPTIONS_PER_STEP)
        latents = encode_pictures(pipeline.vae, draw(classes, generator))
        loss = flow_loss(pipeline, texts, latents, null_tokens[step % len(null_tokens)], generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % AVERAGE_EVERY == 0:
            update_average(average, learner, min(0.98, step / (step + 100)))
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    learner.load_state_dict(average.state_dict())
    learner.eval()


@torch.no_grad()
def update_average(average: nn.Module, learner: nn.Module, keep: float) -> None:
    """Move the averaged weights towards the learner's."""
    for slow, fast in zip(average.parameters(), learner.parameters(), strict=True):
        slow.lerp_(fast, 1 - keep)
