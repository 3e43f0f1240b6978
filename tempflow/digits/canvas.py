"""The canvas: 16x16 RGB pictures made of 2x2 cells, each blank or a handwritten digit of 8x8."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CELL_SIDE = 8
CANVAS_SIDE = 2 * CELL_SIDE
CELLS = 4
BLANK = 10  # class number of an empty cell; the classes 0 to 9 are the digits
CLASSES = 11
POSITIONS = ("top left", "top right", "bottom left", "bottom right")  # order of cells in a grid

SPLIT_SHARES = {"pipeline": 0.28, "reward": 0.36, "gold": 0.36}
HELDOUT_SHARE = 0.15
SPLIT_SEED = 20240

Grid = tuple[int | None, ...]  # four entries in the order of POSITIONS, None for a blank cell


@dataclass(frozen=True)
class DigitSplit:
    """Digits that belong to one purpose only.

    Attributes:
        images: uint8 (N, 8, 8), bright strokes on black, used for training.
        labels: int64 (N,), values 0 to 9.
        heldout_images: uint8 (M, 8, 8), never trained on.
        heldout_labels: int64 (M,).
        members: the numbers (in scikit-learn's order) of all N + M digits of the split.
    """

    images: Tensor
    labels: Tensor
    heldout_images: Tensor
    heldout_labels: Tensor
    members: frozenset[int]


def split_members(labels: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Deal digit numbers to the splits, class by class: name -> (training, held-out) numbers."""
    rng = np.random.default_rng(SPLIT_SEED)
    dealt: dict[str, tuple[list[int], list[int]]] = {name: ([], []) for name in SPLIT_SHARES}
    for digit in range(10):
        members = rng.permutation(np.flatnonzero(labels == digit))
        bounds = np.cumsum([round(share * len(members)) for share in SPLIT_SHARES.values()])[:-1]
        for name, part in zip(SPLIT_SHARES, np.split(members, bounds), strict=True):
            heldout = round(HELDOUT_SHARE * len(part))
            dealt[name][1].extend(part[:heldout].tolist())
            dealt[name][0].extend(part[heldout:].tolist())
    return {name: (np.array(train), np.array(heldout)) for name, (train, heldout) in dealt.items()}


def load_splits() -> dict[str, DigitSplit]:
    """Load scikit-learn's 1797 digits as the disjoint splits `pipeline`, `reward` and `gold`."""
    from sklearn.datasets import load_digits  # only the makers need it, so it is imported late

    bunch = load_digits()
    images = torch.from_numpy(np.round(bunch.images * (255 / 16)).astype(np.uint8))
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    splits = {}
    for name, (train, heldout) in split_members(bunch.target).items():
        splits[name] = DigitSplit(
            images=images[train],
            labels=labels[train],
            heldout_images=images[heldout],
            heldout_labels=labels[heldout],
            members=frozenset(train.tolist() + heldout.tolist()),
        )
    return splits


def classes_of(grid: Grid) -> list[int]:
    """Class numbers of a grid's four cells (None becomes BLANK)."""
    return [BLANK if digit is None else int(digit) for digit in grid]


def cells_of(images: Tensor) -> Tensor:
    """Cut canvases uint8 (B, 3, 16, 16) into grey cells float32 (B, 4, 8, 8) with values 0 to 1."""
    grey = images.float().mean(dim=1) / 255
    rows = grey.reshape(-1, 2, CELL_SIDE, 2, CELL_SIDE)
    return rows.permute(0, 1, 3, 2, 4).reshape(-1, CELLS, CELL_SIDE, CELL_SIDE)


def compose(cells: Tensor) -> Tensor:
    """Put cells uint8 (B, 4, 8, 8) together to canvases uint8 (B, 3, 16, 16)."""
    rows = cells.reshape(-1, 2, 2, CELL_SIDE, CELL_SIDE).permute(0, 1, 3, 2, 4)
    return rows.reshape(-1, 1, CANVAS_SIDE, CANVAS_SIDE).expand(-1, 3, -1, -1).contiguous()


class Renderer:
    """Draws canvases from given digit pictures; the picture of every cell is drawn at random."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        """Take digits uint8 (N, 8, 8) with labels int64 (N,); every digit must occur."""
        blank = torch.zeros(1, CELL_SIDE, CELL_SIDE, dtype=torch.uint8)
        order = torch.argsort(labels, stable=True)
        self.pictures = torch.cat([images[order], blank])
        self.counts = torch.cat([torch.bincount(labels, minlength=10), torch.ones(1, dtype=torch.int64)])
        self.starts = torch.cumsum(self.counts, 0) - self.counts

    def __call__(self, classes: Tensor, generator: torch.Generator) -> Tensor:
        """Render class numbers int64 (B, 4) as canvases uint8 (B, 3, 16, 16)."""
        return compose(self.cells(classes, generator))

    def cells(self, classes: Tensor, generator: torch.Generator) -> Tensor:
        """Pictures uint8 (..., 8, 8) of class numbers int64 (...,)."""
        pick = torch.rand(classes.shape, generator=generator) * self.counts[classes]
        return self.pictures[self.starts[classes] + pick.long()]
