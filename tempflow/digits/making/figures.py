"""Figures of the digits benchmark: how good the classifiers, the autoencoder and the base pipeline are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from tempflow.digits.canvas import DigitSplit, Renderer, classes_of
from tempflow.digits.captions import KINDS, Caption, split_captions, test_prompts
from tempflow.digits.classifiers import CLASSIFIERS, cell_accuracy, load_classifier
from tempflow.digits.scorers import DigitsGold, DigitsReward

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline

CANVASES = 2048
IMAGES_PER_PROMPT = 8
SAMPLING_STEPS = 10
PICTURES_PER_BATCH = 96


class _Prompt:
    """A caption as the scorers see it."""

    def __init__(self, caption: Caption) -> None:
        self.text = caption.text
        self.metadata: Mapping[str, object] = {"grids": caption.grids}


def report_classifiers(folder: Path, splits: dict[str, DigitSplit]) -> Iterator[str]:
    """Accuracy per cell on the own held-out digits and on all digits the classifier has not seen."""
    for name in CLASSIFIERS:
        classifier = load_classifier(name, folder / f"{name}.safetensors")
        own = splits[name]
        others = [split for other, split in splits.items() if other != name]
        images = [own.heldout_images, *(part for split in others for part in (split.images, split.heldout_images))]
        labels = [own.heldout_labels, *(part for split in others for part in (split.labels, split.heldout_labels))]
        heldout = cell_accuracy(classifier, own.heldout_images, own.heldout_labels)
        unseen = cell_accuracy(classifier, torch.cat(images), torch.cat(labels))
        yield f"{name} classifier: {heldout:.4f} of {len(own.heldout_labels)} held-out digits of its split, " \
              f"{unseen:.4f} of all {sum(map(len, labels))} digits it has not seen"  # fmt: skip


def satisfied_canvases(draw: Renderer, count: int, seed: int) -> tuple[Tensor, list[_Prompt]]:
    """Real canvases uint8 (count, 3, 16, 16) that satisfy random captions, with their prompts."""
    generator = torch.Generator().manual_seed(seed)
    captions = [caption for part in split_captions() for caption in part]
    chosen = [captions[number] for number in torch.randint(len(captions), (count,), generator=generator).tolist()]
    places = torch.randint(1000, (count,), generator=generator).tolist()
    grids = [caption.grids[place % len(caption.grids)] for caption, place in zip(chosen, places, strict=True)]
    canvases = draw(torch.tensor([classes_of(grid) for grid in grids]), generator)
    return canvases, [_Prompt(caption) for caption in chosen]


def report_real_canvases(folder: Path, split: DigitSplit) -> str:
    """Scores of canvases made of real digits that neither classifier has seen."""
    draw = Renderer(split.heldout_images, split.heldout_labels)
    return f"real canvases: {_scores(folder, *satisfied_canvases(draw, CANVASES, seed=1))}"


def _scores(folder: Path, images: Tensor, prompts: Sequence[_Prompt]) -> str:
    gold = DigitsGold(folder / "gold.safetensors")(images, prompts).mean().item()
    reward = DigitsReward(folder / "reward.safetensors")(images, prompts).mean().item()
    return f"gold {gold:.4f}, reward {reward:.4f}"


def to_bytes(pictures: Tensor) -> Tensor:
    """Pictures with values 0 to 1 as uint8."""
    return (pictures.clamp(0, 1) * 255).round().to(torch.uint8)


@torch.no_grad()
def report_restored_canvases(folder: Path, pipeline: StableDiffusion3Pipeline, split: DigitSplit) -> str:
    """Scores of real canvases, of digits the autoencoder has not seen, after encoding and decoding."""
    draw = Renderer(split.heldout_images, split.heldout_labels)
    canvases, prompts = satisfied_canvases(draw, CANVASES, seed=1)
    latents = pipeline.vae.encode(canvases.float() / 127.5 - 1).latent_dist.mean
    restored = to_bytes(pipeline.vae.decode(latents).sample / 2 + 0.5)
    return f"canvases restored by the autoencoder: {_scores(folder, restored, prompts)}"


def generate(pipeline: StableDiffusion3Pipeline, texts: Sequence[str], seed: int) -> Tensor:
    """One picture per text, uint8 (B, 3, 16, 16), by SAMPLING_STEPS steps without guidance."""
    generator = torch.Generator().manual_seed(seed)
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for start in tqdm(range(0, len(texts), PICTURES_PER_BATCH), desc="test pictures", mininterval=2):
        batch = list(texts[start : start + PICTURES_PER_BATCH])
        pictures.append(
            pipeline(
                batch,
                num_inference_steps=SAMPLING_STEPS,
                guidance_scale=1.0,
                generator=generator,
                output_type="pt",
                max_sequence_length=pipeline.tokenizer.model_max_length,
            ).images
        )
    return to_bytes(torch.cat(pictures))


def report_base(folder: Path, pipeline: StableDiffusion3Pipeline) -> Iterator[str]:
    """Scores of the pipeline on the test prompts, in total and by kind."""
    captions = [caption for caption in test_prompts() for _ in range(IMAGES_PER_PROMPT)]
    images = generate(pipeline, [caption.text for caption in captions], seed=1)
    prompts = [_Prompt(caption) for caption in captions]
    gold = DigitsGold(folder / "gold.safetensors")(images, prompts)
    reward = DigitsReward(folder / "reward.safetensors")(images, prompts)
    successes = gold.reshape(-1, IMAGES_PER_PROMPT).sum(1)
    mixed = ((successes > 0) & (successes < IMAGES_PER_PROMPT)).float().mean().item()
    yield f"base pipeline, {len(successes)} test prompts x {IMAGES_PER_PROMPT}, {SAMPLING_STEPS} steps: " \
          f"gold {gold.mean().item():.4f}, reward {reward.mean().item():.4f}; " \
          f"prompts with both successes and failures {mixed:.3f}"  # fmt: skip
    for kind in KINDS:
        members = torch.tensor([caption.kind == kind for caption in captions])
        yield f"  {kind}: gold {gold[members].mean().item():.4f}, reward {reward[members].mean().item():.4f}"
