"""The base pipeline of the scenes: that of the digits on a larger canvas, trained on captions of scenes."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from tempflow.digits.making.generator import (
    PICTURES_PER_CAPTION,
    WRONG_SHARE,
    Budget,
    Canvases,
    train_autoencoder,
    train_to_draw,
)
from tempflow.scenes.canvas import BLANK, CANVAS_SIDE, CELLS, Painter
from tempflow.scenes.prompts import TASKS, Task
from tempflow.scenes.scenes import asked_for, missed

KIND_WEIGHTS = {"single_object": 1, "two_object": 2, "counting": 2, "colors": 1, "position": 3, "color_attr": 3}
"""Harder kinds more often."""
FILLED = 0.4
"""share of cells with a digit in random canvases"""


def random_classes(count: int, generator: torch.Generator) -> Tensor:
    """Class numbers int64 (count, 9): blank, or a digit in a colour with equal chance."""
    classes = torch.randint(BLANK, (count, CELLS), generator=generator)
    blank = torch.rand(count, CELLS, generator=generator) >= FILLED
    return classes.masked_fill(blank, BLANK)


def random_canvases(draw: Painter) -> Canvases:
    """Canvases of `random_classes`."""
    return lambda count, generator: draw(random_classes(count, generator), generator)


class TaskSampler:
    """Draws captions, harder kinds more often, and scenes of which a share misses what its caption asks for."""

    def __init__(self, tasks: Sequence[Task], wrong_share: float, seed: int) -> None:
        self.rng, self.wrong_share = random.Random(seed), wrong_share
        self.by_kind = {tag: [task for task in tasks if task["tag"] == tag] for tag in TASKS}

    def __call__(self, count: int) -> tuple[list[str], Tensor]:
        """Texts (count) and class numbers int64 (count * PICTURES_PER_CAPTION, 9)."""
        kinds = self.rng.choices(list(KIND_WEIGHTS), list(KIND_WEIGHTS.values()), k=count)
        chosen = [self.rng.choice(self.by_kind[kind]) for kind in kinds]
        scenes = [self._scene(task) for task in chosen for _ in range(PICTURES_PER_CAPTION)]
        return [task["prompt"] for task in chosen], torch.tensor(scenes)

    def _scene(self, task: Task) -> list[int]:
        return (missed if self.rng.random() < self.wrong_share else asked_for)(task, self.rng)


def train_pipeline(draw: Painter, tasks: Sequence[Task], budget: Budget, seed: int) -> StableDiffusion3Pipeline:
    """Train the autoencoder, then text encoders and transformer: first on true, then on noisy captions."""
    autoencoder = train_autoencoder(random_canvases(draw), CANVAS_SIDE, budget.autoencoder_steps, seed)
    samplers = TaskSampler(tasks, 0.0, seed), TaskSampler(tasks, WRONG_SHARE, seed + 1)
    return train_to_draw(autoencoder, draw, [task["prompt"] for task in tasks], samplers, budget, seed)
