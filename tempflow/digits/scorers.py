"""Scorers of the digits benchmark: does the picture show one of the prompt's acceptable grids?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tempflow.digits.canvas import CANVAS_SIDE, CELLS, cells_of, classes_of
from tempflow.digits.classifiers import load_classifier

if TYPE_CHECKING:
    from tempflow.prompts import Prompt

ASSETS = Path(__file__).parent.parent / "digits"


def wanted_classes(prompts: Sequence[Prompt]) -> Tensor:
    """Acceptable grids of the prompts as class numbers int64 (B, G, 4); G is the largest number of grids.

    A prompt with fewer grids repeats its first one.

    Raises:
        ValueError: a prompt without usable metadata["grids"].
    """
    wanted = [[classes_of(grid) for grid in _grids(prompt)] for prompt in prompts]
    most = max(map(len, wanted), default=1)
    padded = [grids + grids[:1] * (most - len(grids)) for grids in wanted]
    return torch.tensor(padded, dtype=torch.int64).reshape(len(prompts), most, CELLS)


def _grids(prompt: Prompt) -> Sequence[Sequence[int | None]]:
    grids = prompt.metadata.get("grids")
    if not grids or not isinstance(grids, Sequence) or not all(map(_is_grid, grids)):
        raise ValueError(
            f'prompt "{prompt.text}" has grids={grids!r}; give "grids": a list of acceptable grids, each of '
            f"{CELLS} cells (top left, top right, bottom left, bottom right) that are a digit 0 to 9 or null"
        )
    return grids


def _is_grid(grid: object) -> bool:
    return (
        isinstance(grid, Sequence)
        and len(grid) == CELLS
        and all(cell is None or (isinstance(cell, int) and 0 <= cell <= 9) for cell in grid)
    )


class _CellScorer:
    """What both scorers share: reading the cells of canvases with a classifier."""

    classifier_name: str

    def __init__(self, path: str | Path | None = None, device: str | torch.device = "cpu") -> None:
        """Load the classifier from `path` (default: the one shipped with the package) to `device`."""
        self.device = torch.device(device)
        path = ASSETS / f"{self.classifier_name}.safetensors" if path is None else path
        self.classifier = load_classifier(self.classifier_name, path, self.device)

    @staticmethod
    def check(prompts: Sequence[Prompt]) -> None:
        """Raises ValueError unless each prompt has its grids."""
        wanted_classes(prompts)

    @torch.no_grad()
    def read_cells(self, images: Tensor) -> Tensor:
        """Probabilities float32 (B, 4, 11) of the classes in each cell of canvases uint8 (B, 3, 16, 16).

        Raises:
            ValueError: images of another shape or type.
        """
        expected = (3, CANVAS_SIDE, CANVAS_SIDE)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            found = f"found {tuple(images.shape)}, expected (B, {', '.join(map(str, expected))})"
            raise ValueError(f"the digits scorers read canvases of {CANVAS_SIDE}x{CANVAS_SIDE} pixels: {found}")
        if images.dtype != torch.uint8:
            raise ValueError(f"the digits scorers read images of type uint8: found {images.dtype}")
        cells = cells_of(images.to(self.device))
        return self.classifier(cells.flatten(0, 1)).softmax(-1).unflatten(0, (-1, CELLS))

    def wanted_for(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Acceptable grids int64 (B, G, 4), one set per image."""
        if len(images) != len(prompts):
            raise ValueError(f"found {len(images)} images for {len(prompts)} prompts, expected one prompt per image")
        return wanted_classes(prompts).to(self.device)


class DigitsReward(_CellScorer):
    """Graded reward from 0 to 1: how surely the reward classifier sees an acceptable grid.

    It is the mean, over the four cells, of the probability of the wanted class, for the
    acceptable grid that fits best; so a picture with one wrong cell still gets about 0.75.
    """

    classifier_name = "reward"

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score canvases uint8 (B, 3, 16, 16) for B prompts: float32 (B,) on the images' device."""
        wanted = self.wanted_for(images, prompts)
        seen = self.read_cells(images)[:, None].expand(-1, wanted.shape[1], -1, -1)
        fitting = seen.gather(3, wanted[..., None]).squeeze(3)
        return fitting.mean(2).amax(1).to(images.device)


class DigitsGold(_CellScorer):
    """Strict judgement, 0 or 1: the grid read by the gold classifier is acceptable."""

    classifier_name = "gold"

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Judge canvases uint8 (B, 3, 16, 16) for B prompts: float32 (B,) on the images' device."""
        wanted = self.wanted_for(images, prompts)
        seen = self.read_cells(images).argmax(-1)[:, None]
        return (seen == wanted).all(2).any(1).float().to(images.device)
