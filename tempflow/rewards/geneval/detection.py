"""Objects in pictures, for GenEval: Mask2Former finds them, CLIP names their colours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Mask2FormerForUniversalSegmentation

from tempflow.common.tensors import chunks
from tempflow.rewards.geneval.rules import Detection
from tempflow.rewards.geneval.words import CLASSES, COLOURS
from tempflow.rewards.parts.clip_model import load_clip, unit
from tempflow.rewards.parts.pixels import IMAGENET_MEAN, IMAGENET_STD, clip_pixels, grey_out, normalise, resize
from tempflow.rewards.parts.weights import pretrained

SHORT, LONG, MULTIPLE = 800, 1333, 32
"""The detector sees pictures whose shorter side is SHORT, unless the longer one would pass LONG, padded to MULTIPLE."""
BEST = 100
"""(query, class) pairs of one picture that are followed up"""

FLOOR = 0.1
"""confidence below which nothing is kept; GenEval asks for 0.3 at least"""

PHRASES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")


class Detector:
    """Mask2Former for COCO instances; scores and boxes as in mmdetection's instance head."""

    names = CLASSES

    def __init__(self, path: str | Path, rows: int, device: Any) -> None:
        """
        Args:
            path: folder or hub id.
            rows: images in one call.
        """
        kind = Mask2FormerForUniversalSegmentation
        self.model: Any = pretrained(kind, "geneval", "detector", path, torch.float32, device)
        self.rows = rows
        if self.model.config.num_labels != len(CLASSES):
            raise ValueError(f"the detector {path} has {self.model.config.num_labels} classes, expected COCO's 80")

    def __call__(self, images: Tensor) -> list[list[Detection]]:
        """Objects of uint8 images (B, 3, H, W), in no order."""
        return [found for part in chunks(len(images), self.rows) for found in self._detect(images[part])]

    def _detect(self, images: Tensor) -> list[list[Detection]]:
        size = images.shape[-2:]
        pixels, inside = detector_pixels(images.to(self.model.device))
        answer = self.model(pixel_values=pixels)
        classes = answer.class_queries_logits.softmax(-1)[..., :-1]
        found = []
        for probabilities, logits in zip(classes, answer.masks_queries_logits, strict=True):
            masks = F.interpolate(logits[None], pixels.shape[-2:], mode="bilinear", align_corners=False)
            found.append(self._objects(probabilities, masks[..., : inside[0], : inside[1]], size))
        return found

    def _objects(self, classes: Tensor, masks: Tensor, size: torch.Size) -> list[Detection]:
        """Objects of one picture from (Q, 80) class probabilities and (1, Q, h, w) mask logits."""
        scores, places = classes.flatten().topk(min(BEST, classes.numel()))
        queries, kinds = places // classes.shape[1], places % classes.shape[1]
        masks = F.interpolate(masks, size, mode="bilinear", align_corners=False)[0]
        covered = masks > 0
        area = covered.flatten(1).sum(1)
        sureness = (masks.sigmoid() * covered).flatten(1).sum(1) / (area + 1e-6)
        scores = scores * sureness[queries]
        likely = scores > FLOOR  # so the mask is not empty
        rows = zip(*(values[likely].tolist() for values in (queries, kinds, scores)), strict=True)
        return [
            Detection(CLASSES[kind], score, box_of(covered[query]), covered[query].cpu()) for query, kind, score in rows
        ]


def detector_pixels(images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """uint8 (B, 3, H, W) -> what the detector sees, and how much of its height and width is picture."""
    height, width = images.shape[-2:]
    scale = min(SHORT / min(height, width), LONG / max(height, width))
    inside = (int(height * scale + 0.5), int(width * scale + 0.5))
    values = normalise(resize(images, *inside, mode="bilinear"), IMAGENET_MEAN, IMAGENET_STD)
    low, right = (-side % MULTIPLE for side in inside)
    return F.pad(values, (0, right, 0, low)), inside


def box_of(mask: Tensor) -> tuple[float, float, float, float]:
    """The smallest box around a bool mask (H, W) that is not empty."""
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))


class ColourReader:
    """CLIP's choice among ten colours for each object, cut out by its mask before a grey ground."""

    def __init__(self, path: str | Path, dtype: str, device: Any) -> None:
        self.clip = load_clip("geneval", "clip", path, dtype, device)
        self.clip.pixels = lambda values, size: clip_pixels(values, size, half_up=True)
        self.classifiers: dict[str, Tensor] = {}

    def __call__(self, image: Tensor, objects: Sequence[Detection], name: str) -> list[str]:
        """A colour for each object of a class in a uint8 image (3, H, W)."""
        if name not in self.classifiers:
            self.classifiers[name] = self._classifier(name)
        vectors = [self.clip.images(cut_out(image, found)[None]) for found in objects]
        return [COLOURS[int((vector @ self.classifiers[name].T).argmax())] for vector in vectors]

    def _classifier(self, name: str) -> Tensor:
        """Unit vectors (10, E): the mean of each colour's phrases."""
        texts = [phrase.format(colour=colour, name=name) for colour in COLOURS for phrase in PHRASES]
        return unit(self.clip.texts(texts).view(len(COLOURS), len(PHRASES), -1).mean(1))


def cut_out(image: Tensor, found: Detection) -> Tensor:
    """The object's box of a uint8 image (3, H, W), what is outside its mask grey."""
    left, top, right, bottom = (round(side) for side in found.box)
    shown = image if found.mask is None else grey_out(image, found.mask.to(image.device))
    return shown[:, top:bottom, left:right]
