"""The canvas: 24x24 RGB pictures of 3x3 cells, each blank or a handwritten digit of 8x8 in one of six colours."""

from __future__ import annotations

import torch
from torch import Tensor

from tempflow.digits.canvas import BLANK as NO_DIGIT
from tempflow.digits.canvas import CELL_SIDE, Renderer

ACROSS = 3
CELLS = ACROSS**2
CANVAS_SIDE = ACROSS * CELL_SIDE
COLOURS = {
    "red": (255, 48, 48),
    "yellow": (240, 240, 40),
    "green": (48, 220, 48),
    "blue": (72, 96, 255),
    "purple": (200, 64, 255),
    "white": (255, 255, 255),
}
"""Six of GenEval's ten colours, as the brightest stroke shows them on black."""
BLANK = NO_DIGIT * len(COLOURS)
"""class number of an empty cell; digit d in colour c is `d * len(COLOURS) + c`"""

Scene = list[int]
"""Nine class numbers, row by row."""


def box_of_cell(cell: int) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of a cell in pixels; right and bottom are just outside."""
    row, column = divmod(cell, ACROSS)
    left, top = column * CELL_SIDE, row * CELL_SIDE
    return (float(left), float(top), float(left + CELL_SIDE), float(top + CELL_SIDE))


def digit_and_colour(classes: Tensor) -> tuple[Tensor, Tensor]:
    """Class numbers -> digits (10: none) and colours (of an empty cell: 0)."""
    return classes // len(COLOURS), classes % len(COLOURS)


def cells_of(images: Tensor) -> Tensor:
    """Cut canvases uint8 (B, 3, 24, 24) into cells float32 (B, 9, 3, 8, 8) with values 0 to 1."""
    parts = images.float().div(255).unflatten(3, (ACROSS, CELL_SIDE)).unflatten(2, (ACROSS, CELL_SIDE))
    return parts.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def compose(cells: Tensor) -> Tensor:
    """Put cells uint8 (B, 9, 3, 8, 8) together to canvases uint8 (B, 3, 24, 24)."""
    rows = cells.unflatten(1, (ACROSS, ACROSS)).permute(0, 3, 1, 4, 2, 5)
    return rows.flatten(4, 5).flatten(2, 3).contiguous()


def tint(cells: Tensor, colours: Tensor) -> Tensor:
    """Grey cells (..., 8, 8) in the colours (..., 3) of their brightest strokes: (..., 3, 8, 8), as bright as they."""
    return cells.unsqueeze(-3) * (colours / 255)[..., None, None]


class Painter:
    """Draws scenes from given digit pictures; the picture of every cell is drawn at random."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        """Take digits uint8 (N, 8, 8) with labels int64 (N,); every digit must occur."""
        self.digits = Renderer(images, labels)
        self.palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)

    def __call__(self, classes: Tensor, generator: torch.Generator) -> Tensor:
        """Class numbers int64 (B, 9) as canvases uint8 (B, 3, 24, 24)."""
        digits, colours = digit_and_colour(classes)
        cells = tint(self.digits.cells(digits, generator).float(), self.palette[colours])
        return compose(cells.round().to(torch.uint8))
