"""Which forks an optimizer step takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from tempflow.common.tensors import chunks
from tempflow.explore.rollout import Trunk
from tempflow.policy import Conditioning
from tempflow.settings.fields import LearnConfig


@dataclass(frozen=True)
class TransitionBatch:
    """The fork of B trunks at one step: what one forward and backward sees, in the shape of the trunk's own call."""

    step: int
    latents: Tensor
    """(B, D...)"""
    velocity_old: Tensor
    """(B, D...)"""
    keys: Tensor
    """(B, 2)"""
    advantages: Tensor
    """(B, K)"""
    weights: Tensor
    """(B,), noise weight of the step, 0 for a masked group"""
    conditioning: Conditioning
    share: float
    """part of its optimizer step: the shares of one update, left-out batches included, sum to 1"""


def updates(trunk: Trunk, advantages: Tensor, weights: Tensor, learn: LearnConfig) -> Iterator[list[TransitionBatch]]:
    """The batches of each optimizer step, over all inner epochs; the K siblings of a fork are always in one batch.

    A batch is a chunk of `learn.rows` trunks at one fork, as in `sample_trunk`, so that it repeats the trunk's own
    network call exactly. A batch in which every weight is 0 is left out unless a KL term asks for it.

    Args:
        advantages: (S, R, K); weights: (S, R).
    """
    parts, forks = list(chunks(trunk.latents.shape[1], learn.rows)), range(len(trunk.plan.steps))
    per_update = len(parts) // learn.updates
    for _ in range(learn.inner_epochs):
        for first in range(0, len(parts), per_update):
            places = [(part, fork) for part in parts[first : first + per_update] for fork in forks]
            share = 1 / len(places)
            yield [
                _batch(trunk, advantages, weights, part, fork, share)
                for part, fork in places
                if objective.kl or weights[fork, part].any()
            ]


def _batch(
    trunk: Trunk, advantages: Tensor, weights: Tensor, part: slice, fork: int, share: float
) -> TransitionBatch:
    return TransitionBatch(
        step=trunk.plan.steps[fork],
        latents=trunk.latents[fork, part],
        velocity_old=trunk.velocity[fork, part],
        keys=trunk.keys[fork, part],
        advantages=advantages[fork, part],
        weights=weights[fork, part],
        conditioning=trunk.conditioning.rows(part),
        share=share,
    )
