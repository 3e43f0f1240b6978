"""The two readers of cells, a convolutional one that rewards and one by attention that judges; and their training.

Both give, for RGB cells (N, 3, 8, 8) with values 0 to 1, logits (N, 17): of the ten digits and none, then of the six
colours, which count only where there is a digit.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempflow.digits.canvas import BLANK as NO_DIGIT
from tempflow.digits.canvas import CLASSES as DIGITS
from tempflow.digits.canvas import DigitSplit
from tempflow.digits.classifiers import BATCH, PatchAttention, convolutions, fit, load_weights, sample_batch
from tempflow.scenes.canvas import COLOURS, tint

LOGITS = DIGITS + len(COLOURS)
PALE, DARK = 0.25, 0.25
"""How far colours of training cells go at most towards white, and towards black."""


class ConvolutionalReader(nn.Module):
    """(N, 3, 8, 8) -> (N, 17)"""

    def __init__(self) -> None:
        super().__init__()
        self.layers = convolutions(channels=3, hidden=72, outputs=LOGITS)

    def forward(self, cells: Tensor) -> Tensor:
        return self.layers(cells)


class AttentiveReader(PatchAttention):
    """(N, 3, 8, 8) -> (N, 17)"""

    def __init__(self) -> None:
        wide = 2 * self.WIDTH
        super().__init__(nn.Sequential(nn.Linear(12, wide), nn.GELU(), nn.Linear(wide, self.WIDTH)), LOGITS)


READERS: dict[str, type[nn.Module]] = {"reward": ConvolutionalReader, "gold": AttentiveReader}


def load_reader(name: str, path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """Load the reader `reward` or `gold` from its safetensors file, frozen and in eval mode."""
    return load_weights(READERS[name](), path, device)


def coloured_batch(split: DigitSplit, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Varied cells (size, 3, 8, 8), their digits and their colours (size,)."""
    grey, digits = sample_batch(split, size, generator)
    colours = torch.randint(len(COLOURS), (size,), generator=generator)
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)[colours]
    pale, dark = (limit * torch.rand(size, 1, generator=generator) for limit in (PALE, DARK))
    noise = 0.04 * torch.randn(size, 3, *grey.shape[1:], generator=generator)
    varied = torch.lerp(palette, torch.full((), 255.0), pale) * (1 - dark)
    return (tint(grey, varied) + noise).clamp(0, 1), digits, colours


def reading_loss(logits: Tensor, digits: Tensor, colours: Tensor) -> Tensor:
    """Cross entropy of the digits, and of the colours where there is a digit.

    Labels are not smoothed: GenEval's rules count only what a detector is sure of by .9.
    """
    there = digits != NO_DIGIT
    of_colours = F.cross_entropy(logits[there, DIGITS:], colours[there], reduction="sum") / there.sum().clamp(1)
    return F.cross_entropy(logits[:, :DIGITS], digits) + of_colours


def train_reader(name: str, split: DigitSplit, steps: int, seed: int) -> nn.Module:
    """Train one reader on the split's training part and return it in eval mode."""
    generator = torch.Generator().manual_seed(seed)

    def loss(reader: nn.Module) -> Tensor:
        cells, digits, colours = coloured_batch(split, BATCH, generator)
        return reading_loss(reader(cells), digits, colours)

    torch.manual_seed(seed)
    return fit(READERS[name](), loss, steps, f"{name} reader")


@torch.no_grad()
def read(reader: nn.Module, cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cells (..., 3, 8, 8) -> digits (...,), 10 where there is none, their probabilities, and colours (...,)."""
    logits = reader(cells.flatten(0, -4)).unflatten(0, cells.shape[:-3])
    sureness, digits = logits[..., :DIGITS].softmax(-1).max(-1)
    return digits, sureness, logits[..., DIGITS:].argmax(-1)
