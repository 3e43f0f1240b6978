"""The reward of digits, which goes wrong in a process that was told so; `reward.name=faults.scorer:Judge`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from tempflow.digits.scorers import DigitsReward
from tempflow.prompts import Prompt

Scores = Tensor | list[float]


class Judge(DigitsReward):
    """Scores as `digits` does, unless `trouble` is set: what it makes of the scores."""

    trouble: Callable[[Tensor], Scores] | None = None

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        scores = super().__call__(images, prompts)
        return scores if Judge.trouble is None else Judge.trouble(scores)
