"""Figures of the scenes: how good the readers, the autoencoder and the base pipeline are."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from tempflow.digits.canvas import DigitSplit
from tempflow.digits.making.figures import generate, to_bytes
from tempflow.prompts import Prompt
from tempflow.scenes.canvas import BLANK, Painter, cells_of, digit_and_colour
from tempflow.scenes.judges import READERS, load_reader, read
from tempflow.scenes.making.generator import random_classes
from tempflow.scenes.prompts import TASKS, Task, split_tasks
from tempflow.scenes.scenes import asked_for, missed
from tempflow.scenes.scorers import ScenesGold, ScenesReward

CANVASES = 1024
IMAGES_PER_PROMPT = 8


def prompts_of(tasks: Sequence[Task]) -> list[Prompt]:
    """The tasks as scorers see them."""
    return [Prompt(task["prompt"], task) for task in tasks]


def report_readers(folder: Path, splits: dict[str, DigitSplit]) -> Iterator[str]:
    """Shares of digits and of empty cells that a reader reads right in canvases of digits that it has not seen."""
    for name in READERS:
        images, labels = (torch.cat([getattr(split, part) for other, split in splits.items() if other != name])
                          for part in ("images", "labels"))  # fmt: skip
        generator = torch.Generator().manual_seed(2)
        classes = random_classes(CANVASES, generator)
        canvases = Painter(images, labels)(classes, generator)
        digits, _, colours = read(load_reader(name, folder / f"{name}.safetensors"), cells_of(canvases))
        wanted, wanted_colours = digit_and_colour(classes)
        right, there = digits == wanted, classes != BLANK
        both = (right & (colours == wanted_colours))[there].float().mean()
        empty, seen = right[~there].float().mean(), right[there].float().mean()
        yield f"{name} reader: digits {seen:.4f}, with their colours {both:.4f}, empty cells {empty:.4f}"


def report_real(folder: Path, split: DigitSplit) -> Iterator[str]:
    """Scores of canvases of real digits, unseen by the readers, that show what is asked for, and that miss it."""
    draw, rng, tasks = Painter(split.heldout_images, split.heldout_labels), random.Random(1), split_tasks()[1]
    for words, scene in (("show", asked_for), ("miss", missed)):
        chosen = [rng.choice(tasks) for _ in range(CANVASES)]
        classes = torch.tensor([scene(task, rng) for task in chosen])
        canvases = draw(classes, torch.Generator().manual_seed(1))
        yield f"real canvases that {words} what is asked for: {scores(folder, canvases, chosen)}"
        yield from by_kind(folder, canvases, chosen)


def scores(folder: Path, images: Tensor, tasks: Sequence[Task]) -> str:
    """Mean of gold and reward."""
    gold = ScenesGold(folder / "gold.safetensors")(images, prompts_of(tasks))
    reward = ScenesReward(folder / "reward.safetensors")(images, prompts_of(tasks))
    return f"gold {sum(gold) / len(gold):.4f}, reward {sum(reward) / len(reward):.4f}"


def by_kind(folder: Path, images: Tensor, tasks: Sequence[Task]) -> Iterator[str]:
    """The same by kind of prompt."""
    for tag in TASKS:
        here = [place for place, task in enumerate(tasks) if task["tag"] == tag]
        yield f"  {tag}: {scores(folder, images[here], [tasks[place] for place in here])}"


@torch.no_grad()
def report_restored(folder: Path, pipeline: StableDiffusion3Pipeline, split: DigitSplit) -> str:
    """Scores of real canvases, of digits the autoencoder has not seen, after encoding and decoding."""
    draw, rng = Painter(split.heldout_images, split.heldout_labels), random.Random(1)
    tasks = [rng.choice(split_tasks()[1]) for _ in range(CANVASES)]
    canvases = draw(torch.tensor([asked_for(task, rng) for task in tasks]), torch.Generator().manual_seed(1))
    latents = pipeline.vae.encode(canvases.float() / 127.5 - 1).latent_dist.mean
    restored = to_bytes(pipeline.vae.decode(latents).sample / 2 + 0.5)
    return f"canvases restored by the autoencoder: {scores(folder, restored, tasks)}"


def report_base(folder: Path, pipeline: StableDiffusion3Pipeline) -> Iterator[str]:
    """Scores of the pipeline on the test prompts, in total and by kind."""
    tasks = [task for task in split_tasks()[1] for _ in range(IMAGES_PER_PROMPT)]
    images = generate(pipeline, [task["prompt"] for task in tasks], seed=1)
    yield f"base pipeline: {scores(folder, images, tasks)}"
    yield from by_kind(folder, images, tasks)
