"""Pictures of prompts as files: one each, a grid that shows them side by side, and what made them."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tempflow.common.files import write_atomically
from tempflow.prompts import Prompt
from tempflow.trained.source import Member

GRID, LIST = "grid.png", "pictures.json"
LARGEST, SMALLEST = 384, 128
"""Pixels of a picture's longer side in the grid; small pictures are enlarged by a whole number."""
MOST = 24
"""Prompts in the grid."""
GAP, WIDE, TEXT, LINE = 4, 24, 15, 19
"""Pixels between pictures, between those of two noises, and of the writing and its lines."""
PAPER, INK, FAINT = "white", "black", "#6b7280"
LONGEST = 40
"""Letters of a prompt in the name of a file."""


def slug(text: str) -> str:
    """A prompt as part of a file's name. Example: two_red_threes."""
    return re.sub(r"[^\w]+", "_", text.lower()).strip("_")[:LONGEST].strip("_") or "prompt"


def png(picture: Image.Image) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


@dataclass
class Album:
    """A folder of pictures that grows: `000-two_red_threes-0-before.png`, prompt, noise and model."""

    folder: Path
    prompts: Sequence[Prompt]
    noises: int
    about: Mapping[str, Any]
    """what all pictures have in common, for the list"""
    entries: list[dict[str, Any]] = field(default_factory=list)
    tiles: dict[tuple[int, int, str], Image.Image] = field(default_factory=dict)
    """(prompt, noise, model) -> a picture of the grid"""
    models: list[str] = field(default_factory=list)

    def add(self, member: Member, slot: int, noise: int, image: np.ndarray) -> None:
        """Writes a picture, (H, W, 3) uint8."""
        prompt, picture = self.prompts[slot], Image.fromarray(image)
        name = f"{slot:03d}-{slug(prompt.text)}-{noise}-{slug(member.label)}.png"
        write_atomically(self.folder / name, png(picture))
        self.entries.append({"file": name, "prompt": prompt.text, "slot": slot, "noise": noise, **member.describe()})
        if member.label not in self.models:
            self.models.append(member.label)
        if slot < MOST:
            self.tiles[slot, noise, member.label] = resized(picture)

    def finish(self) -> str:
        """Writes the grid and the list; says where they are."""
        write_atomically(self.folder / GRID, png(self.grid()))
        content = json.dumps({**self.about, "pictures": self.entries}, indent=1, ensure_ascii=False)
        write_atomically(self.folder / LIST, f"{content}\n".encode())
        few = f" (of the first {MOST} prompts)" if len(self.prompts) > MOST else ""
        return f"{len(self.entries)} pictures in {self.folder}, side by side in {self.folder / GRID}{few}"

    def grid(self) -> Image.Image:
        """A row per prompt; in it, for each noise, the models side by side."""
        tile, font = next(iter(self.tiles.values())), _font()
        columns = [(noise, model) for noise in range(self.noises) for model in self.models]
        apart = WIDE if len(self.models) > 1 else 0
        lefts = [GAP + place * (tile.width + GAP) + noise * apart for place, (noise, _) in enumerate(columns)]
        width = lefts[-1] + tile.width + GAP
        heads = [_wrapped([f"noise {noise}", model], tile.width, font) for noise, model in columns]
        texts = [_wrapped([prompt.text], width - 2 * GAP, font) for prompt in self.prompts[:MOST]]
        top = GAP + LINE * max(map(len, heads))
        page = Image.new("RGB", (width, top + sum(LINE * len(lines) + tile.height + 3 * GAP for lines in texts)), PAPER)
        pen = ImageDraw.Draw(page)
        for left, lines in zip(lefts, heads, strict=True):
            pen.multiline_text((left, GAP), "\n".join(lines), fill=FAINT, font=font)
        for slot, lines in enumerate(texts):
            pen.multiline_text((GAP, top + GAP), "\n".join(lines), fill=INK, font=font)
            top += 2 * GAP + LINE * len(lines)
            for left, (noise, model) in zip(lefts, columns, strict=True):
                page.paste(self.tiles[slot, noise, model], (left, top))
            top += tile.height + GAP
        return page


def _wrapped(texts: Sequence[str], pixels: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Lines of at most so many pixels, or nearly."""
    letters = max(8, int(pixels / font.getlength("n")))
    return [line for text in texts for line in textwrap.wrap(text, letters)]


def resized(picture: Image.Image) -> Image.Image:
    """A picture for the grid: a small one enlarged dot by dot, a large one reduced."""
    longer = max(picture.size)
    if longer > LARGEST:
        return picture.resize([max(1, side * LARGEST // longer) for side in picture.size], Image.Resampling.LANCZOS)
    factor = max(1, -(-SMALLEST // longer))
    return picture.resize([side * factor for side in picture.size], Image.Resampling.NEAREST)


def _font() -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and has the letters of most alphabets."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", TEXT)
