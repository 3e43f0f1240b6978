"""The two cell classifiers: a convolutional one that rewards, and one by attention that judges."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import trange

from tempflow.digits.canvas import BLANK, CELL_SIDE, CLASSES, DigitSplit

BATCH = 256
"""cells of a training step"""


def convolutions(channels: int, hidden: int, outputs: int) -> nn.Sequential:
    """(N, channels, 8, 8) -> (N, outputs)"""
    return nn.Sequential(
        nn.Conv2d(channels, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 40, 3, padding=1), nn.BatchNorm2d(40), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(40, 56, 3, padding=1), nn.BatchNorm2d(56), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.2), nn.Linear(56 * 4, hidden), nn.ReLU(), nn.Linear(hidden, outputs),
    )  # fmt: skip


class PatchAttention(nn.Module):
    """Attention over 4x4 patches of 2x2 pixels: (N, channels, 8, 8) -> logits (N, outputs)."""

    WIDTH = 48

    def __init__(self, embed: nn.Module, outputs: int) -> None:
        """
        Args:
            embed: (..., 4 channels) -> (..., WIDTH)
        """
        super().__init__()
        self.embed = embed
        self.positions = nn.Parameter(0.1 * torch.randn(16, self.WIDTH))
        layer = nn.TransformerEncoderLayer(
            self.WIDTH, 4, 2 * self.WIDTH, dropout=0.05, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(self.WIDTH)
        self.head = nn.Linear(self.WIDTH, outputs)

    def forward(self, cells: Tensor) -> Tensor:
        patches = F.pixel_unshuffle(cells, 2).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.encoder(self.embed(patches) + self.positions)).mean(dim=1))


class RewardClassifier(nn.Module):
    """Convolutional network: grey cells (N, 8, 8) with values 0 to 1 -> logits (N, 11)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = convolutions(channels=1, hidden=64, outputs=CLASSES)

    def forward(self, cells: Tensor) -> Tensor:
        return self.layers(cells.unsqueeze(1))


class GoldClassifier(PatchAttention):
    """Grey cells (N, 8, 8) -> logits (N, 11)."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, self.WIDTH), CLASSES)

    def forward(self, cells: Tensor) -> Tensor:
        return super().forward(cells.unsqueeze(1))


CLASSIFIERS: dict[str, type[nn.Module]] = {"reward": RewardClassifier, "gold": GoldClassifier}


def load_classifier(name: str, path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """Load the classifier `reward` or `gold` from its safetensors file, frozen and in eval mode."""
    return load_weights(CLASSIFIERS[name](), path, device)


def load_weights(network: nn.Module, path: str | Path, device: str | torch.device) -> nn.Module:
    """The network with the weights of a safetensors file in fp32, frozen and in eval mode."""
    weights = load_file(str(path))
    network.load_state_dict({key: value.float() if value.is_floating_point() else value
                             for key, value in weights.items()})  # fmt: skip
    return network.to(device).eval().requires_grad_(False)


def save_weights(network: nn.Module, path: Path) -> None:
    """Write the weights in half precision as safetensors."""
    state = {key: value.half() if value.is_floating_point() else value
             for key, value in network.state_dict().items()}  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, str(path))


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, 1, 1, generator=generator)


def _warp(cells: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, stretch, slant and shift (up to a pixel) each cell a little."""
    count = len(cells)
    angle = _uniform(count, -0.2, 0.2, generator).flatten()
    stretch = _uniform(count, 0.88, 1.15, generator).flatten()
    slant = _uniform(count, -0.15, 0.15, generator).flatten()
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = angle.cos() * stretch, -angle.sin() + slant
    theta[:, 1, 0], theta[:, 1, 1] = angle.sin(), angle.cos() * _uniform(count, 0.9, 1.12, generator).flatten()
    theta[:, :, 2] = (torch.rand(count, 2, generator=generator) * 2 - 1) * (2 / CELL_SIDE)
    grid = F.affine_grid(theta, [count, 1, CELL_SIDE, CELL_SIDE], align_corners=False)
    return F.grid_sample(cells.unsqueeze(1), grid, align_corners=False).squeeze(1)


def _blur(cells: Tensor, strength: Tensor) -> Tensor:
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    soft = F.conv2d(cells.unsqueeze(1), kernel[None, None], padding=1).squeeze(1)
    return torch.lerp(cells, soft, strength)


def augment(cells: Tensor, generator: torch.Generator) -> Tensor:
    """Vary grey cells (N, 8, 8) as generated pictures vary: place, shape, sharpness, light, noise."""
    count = len(cells)
    warped = torch.rand(count, 1, 1, generator=generator) < 0.75
    cells = torch.where(warped, _warp(cells, generator), cells)
    cells = _blur(cells, _uniform(count, -0.15, 0.5, generator))
    cells = cells * _uniform(count, 0.75, 1.15, generator)
    cells = cells + _uniform(count, 0, 0.09, generator) * torch.randn(cells.shape, generator=generator)
    return cells.clamp(0, 1)


def sample_batch(split: DigitSplit, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Augmented cells (size, 8, 8) and labels (size,); an eleventh of them blank, some with faint specks."""
    pick = torch.randint(len(split.labels), (size,), generator=generator)
    labels = split.labels[pick].clone()
    cells = split.images[pick].float() / 255
    blank = torch.rand(size, generator=generator) < 1 / CLASSES
    faint = (torch.rand(size, 1, 1, generator=generator) < 0.5) * _uniform(size, 0, 0.2, generator)
    cells = torch.where(blank[:, None, None], faint * cells, cells)
    labels[blank] = BLANK
    return augment(cells, generator), labels


def train_classifier(name: str, split: DigitSplit, steps: int, seed: int) -> nn.Module:
    """Train one classifier on the split's training part and return it in eval mode."""
    generator = torch.Generator().manual_seed(seed)

    def loss(classifier: nn.Module) -> Tensor:
        cells, labels = sample_batch(split, BATCH, generator)
        return F.cross_entropy(classifier(cells), labels, label_smoothing=0.03)

    torch.manual_seed(seed)
    return fit(CLASSIFIERS[name](), loss, steps, f"{name} classifier")


def fit(network: nn.Module, loss_of: Callable[[nn.Module], Tensor], steps: int, words: str) -> nn.Module:
    """Train a small network in place and return it in eval mode.

    Args:
        loss_of: network -> its loss on a batch of its own. words: for the progress.
    """
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in trange(steps, desc=words, mininterval=2):
        loss = loss_of(network)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def cell_accuracy(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of digits uint8 (N, 8, 8) and as many blank cells that get their class."""
    cells = torch.cat([images.float() / 255, torch.zeros(len(images) // 10, CELL_SIDE, CELL_SIDE)])
    wanted = torch.cat([labels, labels.new_full((len(images) // 10,), BLANK)])
    return (classifier(cells).argmax(-1) == wanted).float().mean().item()
