"""Evaluation on held-out prompts: ODE sampling from fixed noises, scored by the rewards and by the gold panel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tempflow.common.draws import EVALUATION, Draw
from tempflow.common.tensors import chunks
from tempflow.credit.advantage import known_mean
from tempflow.credit.decoding import Decoded, check_lost, decode_branches
from tempflow.explore.schedule import NoiseSchedule, build_schedule
from tempflow.explore.tails.engine import TailEngine
from tempflow.parallel.ranks import Ranks
from tempflow.policy import ImageDecoder, Policy
from tempflow.prompts import Prompt
from tempflow.rewards.panel import Panel
from tempflow.settings.fields import Config

MOST_KINDS = 24
"""Kinds of prompts that scores are told by; more of them are numbers or names."""


@dataclass(frozen=True)
class Evaluation:
    """Scores and pictures of one evaluation."""

    scores: dict[str, Tensor]
    """scorer -> scores of all prompts, means over their noises, (n,) fp32; NaN where it has no opinion"""
    missing: int
    """how many opinions are missing, of all scorers and images"""
    pictures: Tensor
    """(n, 3, H, W) uint8, the same prompts and noises every time"""
    lost: dict[str, int] = field(default_factory=dict)
    """how many images were NaN, by the part to blame; they have no scores"""
    kinds: dict[str, float] = field(default_factory=dict)
    """as `means_by_kind`"""

    def means(self) -> dict[str, float | None]:
        """scorer -> mean over the prompts it has an opinion of, if any."""
        return {name: known_mean(scores) for name, scores in self.scores.items()}


@dataclass(frozen=True)
class Evaluator:
    """What stays the same from one evaluation to the next."""

    policy: Policy
    engine: TailEngine
    schedule: NoiseSchedule
    prompts: Sequence[Prompt]
    rewards: Panel
    gold: Panel
    ranks: Ranks
    seed: int
    """of the noises"""
    noises: int
    """N, per prompt"""
    decoder: ImageDecoder
    """what makes its images: the model's own, never a light one"""
    decode_rows: int
    pictures: int

    @property
    def pictured(self) -> list[int]:
        """Indices of the prompts whose pictures are kept, spread over the file."""
        count = min(self.pictures, len(self.prompts))
        return [place * len(self.prompts) // count for place in range(count)]

    @property
    def golds(self) -> list[str]:
        """Names of the gold scores: `gold`, or `gold_` and the scorer's name if there are several."""
        several = len(self.gold.scorers) > 1
        return [f"gold_{label}" if several else "gold" for label in self.gold.scorers]

    @torch.no_grad()
    def evaluate(self, strict: bool = False) -> Evaluation:
        """An image per prompt and noise. Every rank takes its part of the prompts; all see the same result.

        Args:
            strict: no image may be NaN, since nothing was learnt yet.
        Raises:
            BadInput: a scorer fails, on any rank, or has no opinion of any picture.
            Halted: all images are NaN, or any where none may be.
        """
        padded = -(-len(self.prompts) // self.ranks.size) * self.ranks.size
        slots = self.ranks.share(padded)
        own = [self.prompts[min(slot, len(self.prompts) - 1)] for slot in slots]
        prompts = [prompt for prompt in own for _ in range(self.noises)]
        decoded = self.ranks.agree(lambda: self._sample(slots, prompts), "tails.level")
        lost = check_lost(self.ranks.gather(decoded.counts()[None], 0), "of the evaluation", strict)
        images = decoded.images
        table = self.ranks.agree(lambda: torch.cat((self.rewards(images, prompts), self.gold(images, prompts))))
        table = table.masked_fill(decoded.lost, torch.nan)
        table = self.ranks.gather(table, 1)[:, : len(self.prompts) * self.noises]
        scores = {name: row.view(-1, self.noises).nanmean(1) for name, row in self._named(table).items()}
        return Evaluation(scores, int(table.isnan().sum()), self._pictures(images[:: self.noises], slots), lost,
                          means_by_kind(scores, self.prompts))  # fmt: skip

    def _named(self, table: Tensor) -> dict[str, Tensor]:
        """The rows of scores (rewards and golds, n N) under their names in the metrics; first the rewards' sum."""
        rewards, golds = table.split((len(self.rewards.scorers), len(self.gold.scorers)))
        self.rewards.check_opinions(rewards)
        self.gold.check_opinions(golds)
        several = self.rewards.scorers if len(rewards) > 1 else ()
        names = ["reward_test", *(f"reward_test_{label}" for label in several), *self.golds]
        rows = [self.rewards.total(rewards), *rewards[: len(several)], *golds]
        return dict(zip(names, rows, strict=True))

    def _pictures(self, images: Tensor, slots: range) -> Tensor:
        """The pictured images; each rank contributes those it holds, and zeros for the others."""
        own = torch.zeros(1, len(self.pictured), *self.policy.image_shape, dtype=torch.uint8)
        for place, slot in enumerate(self.pictured):
            if slot in slots:
                own[0, place] = images[slot - slots.start]
        return self.ranks.gather(own, 0).amax(0)

    def _sample(self, slots: range, prompts: Sequence[Prompt]) -> Decoded:
        """(len(prompts), 3, H, W) images from the noises of the slots, slot by slot."""
        draw = Draw.grid(self.seed, EVALUATION, slots, self.noises)
        latents = sample_latents(self.policy, self.engine, self.schedule, draw, prompts)
        return decode_branches(self.decoder, latents, self.decode_rows)


def means_by_kind(scores: Mapping[str, Tensor], prompts: Sequence[Prompt]) -> dict[str, float]:
    """`NAME/KIND` -> mean of a score over the prompts of a kind; nothing where prompts are not of several kinds, or of
    more than MOST_KINDS, which are no kinds.

    Args:
        scores: name -> (n,) by prompt, NaN where there is no opinion.
    """
    kinds = [prompt.kind for prompt in prompts]
    named = dict.fromkeys(filter(None, kinds))
    if not 1 < len(named) <= MOST_KINDS:
        return {}
    places = {kind: [place for place, own in enumerate(kinds) if own == kind] for kind in named}
    means = {f"{name}/{kind}": known_mean(values[where]) for name, values in scores.items()
             for kind, where in places.items()}  # fmt: skip
    return {name: mean for name, mean in means.items() if mean is not None}


@torch.no_grad()
def sample_latents(
    policy: Policy, engine: TailEngine, schedule: NoiseSchedule, draw: Draw, prompts: Sequence[Prompt]
) -> Tensor:
    """(R, D...) finished latents of R prompts, along the ODE from the noises of a draw, `engine.rows` a call."""
    latents = draw.initial_noise(policy.latent_shape, policy.device)
    for part in chunks(len(latents), engine.rows):
        conditioning = policy.encode([prompt.text for prompt in prompts[part]])
        engine.finish(latents[part], [0] * len(latents[part]), conditioning, schedule)
    return latents


def evaluation_schedule(config: Config, policy: Policy) -> NoiseSchedule:
    """The sigmas of `eval.steps` steps, of which no noise is taken."""
    return build_schedule(policy.sigmas(config.eval.steps), config.sample.transition, 1.0)
