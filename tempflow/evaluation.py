"""Evaluation on held-out prompts: ODE sampling from fixed noises, scored by the reward and by the gold scorer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tempflow.batching import chunks
from tempflow.branching import decode_branches
from tempflow.distributed import Ranks
from tempflow.draws import EVALUATION, Draw
from tempflow.policy import Policy
from tempflow.prompts import Prompt
from tempflow.rewards import Scorer
from tempflow.schedule import NoiseSchedule
from tempflow.tail_engine import TailEngine


@dataclass(frozen=True)
class Evaluation:
    """Scores and pictures of one evaluation."""

    scores: dict[str, float]
    """scorer -> mean over all prompts"""
    pictures: Tensor
    """(n, 3, H, W) uint8, the same prompts and noises every time"""


@dataclass(frozen=True)
class Evaluator:
    """What stays the same from one evaluation to the next."""

    policy: Policy
    engine: TailEngine
    schedule: NoiseSchedule
    prompts: Sequence[Prompt]
    scorers: dict[str, Scorer]
    ranks: Ranks
    run_seed: int
    decode_rows: int
    pictures: int

    @property
    def pictured(self) -> list[int]:
        """Indices of the prompts whose pictures are kept, spread over the file."""
        count = min(self.pictures, len(self.prompts))
        return [place * len(self.prompts) // count for place in range(count)]

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """One image per prompt. Every rank takes its part of the prompts; all see the same result."""
        padded = -(-len(self.prompts) // self.ranks.size) * self.ranks.size
        slots = self.ranks.share(padded)
        prompts = [self.prompts[min(slot, len(self.prompts) - 1)] for slot in slots]
        images = self._sample(slots, prompts)
        scores = {
            name: self.ranks.gather(scorer(images, prompts), 0)[: len(self.prompts)].mean().item()
            for name, scorer in self.scorers.items()
        }
        return Evaluation(scores, self._pictures(images, slots))

    def _pictures(self, images: Tensor, slots: range) -> Tensor:
        """The pictured images; each rank contributes those it holds, and zeros for the others."""
        own = torch.zeros(1, len(self.pictured), *self.policy.image_shape, dtype=torch.uint8)
        for place, slot in enumerate(self.pictured):
            if slot in slots:
                own[0, place] = images[slot - slots.start]
        return self.ranks.gather(own, 0).amax(0)

    def _sample(self, slots: range, prompts: Sequence[Prompt]) -> Tensor:
        """(len(slots), 3, H, W) uint8 images from the noises of the slots."""
        draw = Draw.grid(self.run_seed, EVALUATION, slots, 1)
        latents = draw.initial_noise(self.policy.latent_shape, self.policy.device)
        for part in chunks(len(latents), self.engine.rows):
            conditioning = self.policy.encode([prompt.text for prompt in prompts[part]])
            self.engine.finish(latents[part], [0] * len(latents[part]), conditioning, self.schedule)
        return decode_branches(self.policy, latents, self.decode_rows)
