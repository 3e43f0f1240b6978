"""Scorers of the scenes: GenEval's rules, with a small reader of cells in place of Mask2Former and CLIP.

The reward is Flow-GRPO's graded score by one reader; gold is the benchmark's own judgement by another, which is never
optimised. Everything that is done with what was found is `tempflow.rewards.geneval.rules`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tempflow.digits.captions import NAMES
from tempflow.prompts import Prompt
from tempflow.rewards.geneval.rules import SCORES, ByRules, Detection
from tempflow.scenes.canvas import CANVAS_SIDE, COLOURS, box_of_cell, cells_of
from tempflow.scenes.judges import load_reader, read

ASSETS = Path(__file__).parent


@dataclass(frozen=True)
class Coloured(Detection):
    """A digit in a cell."""

    colour: str


class CellDetector:
    """Finds at most one digit in each cell of a canvas."""

    names = NAMES

    def __init__(self, name: str, path: str | Path | None, device: str | torch.device) -> None:
        """
        Args:
            name: `reward` or `gold`. path: its weights; None for those shipped with the package.
        """
        self.device = torch.device(device)
        self.reader = load_reader(name, ASSETS / f"{name}.safetensors" if path is None else path, self.device)

    def __call__(self, images: Tensor) -> list[list[Coloured]]:
        """Digits of canvases uint8 (B, 3, 24, 24), cell by cell."""
        found = (values.tolist() for values in read(self.reader, cells_of(images.to(self.device))))
        return [self._digits(*picture) for picture in zip(*found, strict=True)]

    @staticmethod
    def _digits(digits: Sequence[int], sureness: Sequence[float], colours: Sequence[int]) -> list[Coloured]:
        names = list(COLOURS)
        rows = enumerate(zip(digits, sureness, colours, strict=True))
        return [Coloured(NAMES[digit], sure, box_of_cell(cell), None, names[colour])
                for cell, (digit, sure, colour) in rows if digit < len(NAMES)]  # fmt: skip


class _SceneScorer(ByRules):
    """What both scorers share."""

    reader: str
    score: str
    colour_names = tuple(COLOURS)

    def __init__(self, path: str | Path | None = None, device: str | torch.device = "cpu") -> None:
        """Load the reader from `path` (default: the one shipped with the package) to `device`."""
        self.judge = SCORES[self.score]
        self.detect = CellDetector(self.reader, path, device)

    def colours(self, image: Tensor, objects: Sequence[Detection], name: str) -> list[str]:
        """A colour for each digit, known since it was found."""
        return [found.colour for found in objects if isinstance(found, Coloured)]

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> list[float]:
        """Canvases uint8 (B, 3, 24, 24) and B prompts with GenEval metadata -> B scores.

        Raises:
            ValueError: pictures of another size, or what a prompt asks for is none of digits and six colours.
        """
        if tuple(images.shape[2:]) != (CANVAS_SIDE, CANVAS_SIDE):
            found = f"found {tuple(images.shape)}, expected (B, 3, {CANVAS_SIDE}, {CANVAS_SIDE})"
            raise ValueError(f"the scenes scorers read canvases of {CANVAS_SIDE}x{CANVAS_SIDE} pixels: {found}")
        return super().__call__(images, prompts)


class ScenesReward(_SceneScorer):
    """Graded reward: the mean over what is asked for of how far it is there (Flow-GRPO's score, at most 1)."""

    reader, score = "reward", "graded"


class ScenesGold(_SceneScorer):
    """GenEval's judgement, 0 or 1."""

    reader, score = "gold", "geneval"
