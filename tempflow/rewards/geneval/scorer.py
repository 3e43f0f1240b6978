"""GenEval (arXiv 2310.11513) without mmdetection: Mask2Former finds objects, CLIP names their colours, rules.py judges.

The detector is transformers' Mask2Former with a Swin-S backbone trained on COCO, the same network and data as
GenEval's mmdetection checkpoint but another training run, so single judgements may differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tempflow.rewards.geneval.detection import ColourReader, Detector
from tempflow.rewards.geneval.rules import SCORES, ByRules, Detection
from tempflow.rewards.parts.weights import one_of


@dataclass
class GenEval(ByRules):
    """Object-focused faithfulness to a prompt with GenEval metadata."""

    detector: str | Path = "facebook/mask2former-swin-small-coco-instance"
    """folder or hub id of a Mask2Former for COCO instances"""
    clip: str | Path = "openai/clip-vit-large-patch14"
    """folder or hub id of the CLIP that names colours"""
    score: str = "graded"
    """graded, strict or geneval"""
    rows: int = 8
    """images in one call of the detector"""
    dtype: str = "fp32"
    """fp32, bf16 or fp16 of CLIP; the detector is fp32. On a GPU too: what they say is counted and compared (a box kept
    or not, the nearest of ten colours), so rounding does not move a score a little but flips an answer"""
    device: Any = "cpu"

    def __post_init__(self) -> None:
        self.judge = one_of("geneval", "score", self.score, SCORES)
        self.detect = Detector(self.detector, self.rows, self.device)
        self.read_colours = ColourReader(self.clip, self.dtype, self.device)

    def colours(self, image: Tensor, objects: Sequence[Detection], name: str) -> list[str]:
        """A colour for each object of a class in a uint8 image (3, H, W)."""
        return self.read_colours(image, objects, name)
