"""OCR: is the wanted text in the picture? Read by RapidOCR, whose models lie in its wheel: no download, no GPU.

Score, as Flow-GRPO's: 1 - min(distance, n) / n, with the edit distance between the text read (all lines, joined) and
the wanted text of n characters, both in lower case without spaces; 1 if the wanted text stands anywhere in it. The
wanted text is that after the prompt's first straight quote, to the next one or to the end, as Flow-GRPO's.

Beyond theirs: metadata["text"] goes before any quotes, curly quotes count where there is no straight one, line breaks
count as little as spaces, and a prompt that asks for nothing is an error rather than a division by 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from tempflow.prompts import Prompt
from tempflow.rewards.parts.pixels import check_images
from tempflow.rewards.parts.weights import require

QUOTED = re.compile(r'"([^"]*)')
CURLY = re.compile(r"“([^”]+)”")


class Ocr:
    """Closeness of the text in the picture to the text asked for, 0 to 1."""

    def __init__(self, side: int = 960, threads: int = -1) -> None:
        """
        Args:
            side: pictures whose longer side has more pixels are searched for text at this size (PaddleOCR's default,
                and so Flow-GRPO's); smaller ones as they are.
            threads: CPU threads of one call; -1 leaves the choice to onnxruntime.
        """
        require("ocr", "onnxruntime")
        self.distance = require("ocr", "rapidfuzz.distance").Levenshtein.distance
        settings = {
            "Global.log_level": "error",
            "Global.use_cls": False,  # text upside down does not count as written
            "Det.limit_type": "max",
            "Det.limit_side_len": side,
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
        }
        self.reader: Any = require("ocr", "rapidocr").RapidOCR(params=settings)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> list[float]:
        """uint8 (B, 3, H, W) and B prompts -> B scores."""
        check_images(images, prompts)
        texts = [wanted_text(prompt) for prompt in prompts]
        return [self.closeness(self.read(image), text) for image, text in zip(images, texts, strict=True)]

    @staticmethod
    def check(prompts: Sequence[Prompt]) -> None:
        """Raises ValueError unless each prompt says which text it wants."""
        for prompt in prompts:
            wanted_text(prompt)

    def read(self, image: Tensor) -> str:
        """All text of a uint8 (3, H, W) image."""
        levels = np.ascontiguousarray(image.cpu().numpy().transpose(1, 2, 0)[:, :, ::-1])  # RapidOCR wants BGR
        return "".join(self.reader(levels).txts or ())

    def closeness(self, found: str, wanted: str) -> float:
        """1 for the same text, 0 for one with nothing in common; spaces and case do not count."""
        found, wanted = squeezed(found), squeezed(wanted)
        if wanted in found:
            return 1.0
        return 1 - min(self.distance(found, wanted), len(wanted)) / len(wanted)


def squeezed(text: str) -> str:
    """Lower case, no spaces and line breaks; tabs and other blanks stay, as in Flow-GRPO."""
    return "".join(text.lower().replace(" ", "").splitlines())


def wanted_text(prompt: Prompt) -> str:
    """The text that the picture should show.

    Raises:
        ValueError: the prompt says none.
    """
    text = prompt.metadata.get("text")
    if text is None:
        match = QUOTED.search(prompt.text) or CURLY.search(prompt.text)
        text = match and match[1]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"prompt '{prompt.text}' asks for no text: give metadata \"text\", or quote it in the prompt")
    return text
