"""The two readers of cells, a convolutional one that rewards and one by attention that judges; and their training.

Both give, for RGB cells (N, 3, 8, 8) with values 0 to 1, logits (N, 17): of the ten digits and none, then of the six
colours, which count only where there is a digit.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import trange

from tempflow.digits.canvas import BLANK as NO_DIGIT
from tempflow.digits.canvas import CLASSES as DIGITS
from tempflow.digits.canvas import DigitSplit
from tempflow.digits.classifiers import sample_batch
from tempflow.scenes.canvas import COLOURS, tint

LOGITS = DIGITS + len(COLOURS)
PALE, DARK = 0.25, 0.25
"""How far colours of training cells go at most towards white, and towards black."""


class ConvolutionalReader(nn.Module):
    """(N, 3, 8, 8) -> (N, 17)"""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
            nn.Conv2d(24, 40, 3, padding=1), nn.BatchNorm2d(40), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(40, 56, 3, padding=1), nn.BatchNorm2d(56), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.2), nn.Linear(56 * 4, 72), nn.ReLU(), nn.Linear(72, LOGITS),
        )  # fmt: skip

    def forward(self, cells: Tensor) -> Tensor:
        return self.layers(cells)


class AttentiveReader(nn.Module):
    """Attention over 4x4 patches of 2x2 pixels: (N, 3, 8, 8) -> (N, 17)"""

    WIDTH = 48

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(12, 2 * self.WIDTH), nn.GELU(), nn.Linear(2 * self.WIDTH, self.WIDTH))
        self.positions = nn.Parameter(0.1 * torch.randn(16, self.WIDTH))
        layer = nn.TransformerEncoderLayer(
            self.WIDTH, 4, 2 * self.WIDTH, dropout=0.05, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(self.WIDTH)
        self.head = nn.Linear(self.WIDTH, LOGITS)

    def forward(self, cells: Tensor) -> Tensor:
        patches = F.pixel_unshuffle(cells, 2).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.encoder(self.embed(patches) + self.positions)).mean(dim=1))


READERS: dict[str, type[nn.Module]] = {"reward": ConvolutionalReader, "gold": AttentiveReader}


def load_reader(name: str, path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """Load the reader `reward` or `gold` from its safetensors file, frozen and in eval mode."""
    reader, weights = READERS[name](), load_file(str(path))
    reader.load_state_dict({key: value.float() if value.is_floating_point() else value
                            for key, value in weights.items()})  # fmt: skip
    return reader.to(device).eval().requires_grad_(False)


def save_reader(reader: nn.Module, path: Path) -> None:
    """Write the weights in half precision as safetensors."""
    state = {key: value.half() if value.is_floating_point() else value for key, value in reader.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in state.items()}, str(path))


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
    torch.manual_seed(seed)
    generator, reader = torch.Generator().manual_seed(seed), READERS[name]().train()
    optimizer = torch.optim.AdamW(reader.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in trange(steps, desc=f"{name} reader", mininterval=2):
        cells, digits, colours = coloured_batch(split, 256, generator)
        loss = reading_loss(reader(cells), digits, colours)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return reader.eval()


@torch.no_grad()
def read(reader: nn.Module, cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cells (..., 3, 8, 8) -> digits (...,), 10 where there is none, their probabilities, and colours (...,)."""
    logits = reader(cells.flatten(0, -4)).unflatten(0, cells.shape[:-3])
    sureness, digits = logits[..., :DIGITS].softmax(-1).max(-1)
    return digits, sureness, logits[..., DIGITS:].argmax(-1)
