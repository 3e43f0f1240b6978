"""Scorers: `(images uint8 (B, 3, H, W), prompts) -> B numbers`. One file per scorer; yours by import path."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tempflow.batching import chunks
from tempflow.errors import BadInput
from tempflow.prompts import Prompt

SCORERS = {
    "digits": "tempflow.rewards.digits:DigitsReward",
    "digits_gold": "tempflow.rewards.digits:DigitsGold",
}
"""name -> `module:attribute`; a class is called without arguments to make the scorer."""


@dataclass(frozen=True)
class Scorer:
    """A scoring function under its name, called with batches of `rows` images, its answers checked."""

    setting: str
    name: str
    function: Callable[[Tensor, Sequence[Prompt]], Tensor | Sequence[float]]
    rows: int
    parallel: int = 0
    """calls that may wait for another machine at once; 0 for a scorer that computes here"""

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(B, 3, H, W) uint8 images and B prompts -> (B,) fp32.

        Raises:
            BadInput: the function refuses its input, or answers with a wrong number of values or a non-finite one.
        """
        parts = [self._score(images[part], prompts[part]) for part in chunks(len(images), self.rows)]
        return torch.cat(parts)

    def _score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        try:
            with torch.no_grad():
                scores = torch.as_tensor(self.function(images, prompts), dtype=torch.float32).cpu()
        except (ValueError, TypeError) as error:
            mend = f"the scorer refuses its input or answers with no numbers: {error}"
            raise BadInput(self.setting, self.name, mend) from error
        if scores.shape != (len(images),):
            mend = f"must return one number per image: expected ({len(images)},), found {tuple(scores.shape)}"
            raise BadInput(self.setting, self.name, mend)
        if not torch.isfinite(scores).all():
            place = int(torch.nonzero(~torch.isfinite(scores))[0, 0])
            value = scores[place].item()
            word = "NaN" if math.isnan(value) else "an infinite value"
            mend = f'returned {word} for "{prompts[place].text}"; rewards must be finite'
            raise BadInput(self.setting, self.name, mend)
        return scores


def load_scorer(setting: str, name: str, rows: int) -> Scorer:
    """The scorer called `name` in SCORERS, or at `module:attribute`.

    Args:
        setting: the field that names it, for error messages.
    """
    path = SCORERS.get(name, name)
    module, colon, attribute = path.partition(":")
    if not (module and colon and attribute):
        raise BadInput(setting, name, f"no such scorer; choose one of {', '.join(SCORERS)} or give module:attribute")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a script's own folder is on the path, the user's working folder is not
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, SyntaxError) as error:
        raise BadInput(setting, name, f"cannot be imported ({error})") from error
    if not callable(found):
        raise BadInput(setting, name, "is not callable; give a function (images, prompts) -> scores, or a class of one")
    return Scorer(setting, name, found() if isinstance(found, type) else found, rows)
