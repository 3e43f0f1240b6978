"""Which decisions an optimizer step learns from, and in which network calls.

A batch is a chunk of `learn.rows` rows of one decision, as in `explore`, so that it repeats the sampling policy's own
network call exactly. The K siblings of a decision are always in one batch, and those of a fork in one optimizer step.

Deviation: the released code shuffles the rows of one fork over optimizer steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from tempflow.common.tensors import chunks
from tempflow.credit.advantage import Credit
from tempflow.explore.rollout import Decision, Rollout
from tempflow.learn.objective import Objective
from tempflow.policy import Conditioning
from tempflow.settings.fields import LearnConfig


@dataclass(frozen=True)
class TransitionBatch:
    """B rows of one decision: what one forward and backward sees, in the shape of the sampling policy's own call.

    Example: TempFlow-GRPO with learn.rows = 4, K = 6: 4 rows that carry 24 siblings; later in a window, 4 rows that
    carry one each.
    """

    steps: Tensor
    """(B,) int64 on the host"""
    latents: Tensor
    """(B, D...) fp32"""
    velocity_old: Tensor
    """(B, D...) fp32"""
    keys: Tensor
    """(B, 2) int64"""
    advantages: Tensor
    """(B, K) fp32 on the host"""
    terms: Tensor
    """(B, 4) fp32 on the host: weight (0 for a masked group), square, product, kl"""
    conditioning: Conditioning
    share: float
    """part of its optimizer step: the shares of one update, left-out batches included, sum to 1, or where idle groups
    are dropped to the factor that makes the mean one over the others"""


@dataclass(frozen=True)
class Update:
    """One optimizer step. Example: 8 trunks in rows of 4 with 9 forks of window 1: 18 batches, each with share 1/18."""

    batches: list[TransitionBatch]
    idle: bool
    """no process has anything to learn in it"""


@dataclass(frozen=True)
class _Cut:
    """The part of a rollout that an optimizer step takes."""

    trunks: range
    """of this process"""
    forks: range


def cuts(trunks: int, forks: int, learn: LearnConfig) -> list[_Cut]:
    """The optimizer steps of one inner epoch, of R trunks and S forks."""
    share, groups = trunks // learn.updates, FORKS_OF_A_STEP[learn.updates_by](forks)
    return [_Cut(range(first, first + share), group) for first in range(0, trunks, share) for group in groups]


FORKS_OF_A_STEP = {
    "trunks": lambda forks: [range(forks)],
    "forks": lambda forks: [range(fork, fork + 1) for fork in range(forks)],
}
"""What an optimizer step takes of S forks, by the values of learn.updates_by."""


def updates(
    rollout: Rollout, credit: Credit, objective: Objective, learn: LearnConfig, own: range, in_step: bool = False
) -> Iterator[Update]:
    """The optimizer steps of an iteration, over all inner epochs.

    Args:
        credit: of the R trunks of all processes; `own` are those of this one.
        in_step: leave a batch out only where no process learns from its own one in that place.
    """
    mine = replace(credit, advantages=credit.advantages[:, own.start : own.stop],
                   informative=credit.informative[:, own.start : own.stop])  # fmt: skip
    everyone = credit.informative.view(len(credit.informative), -1, len(own))
    telling = everyone.any(1) if in_step else mine.informative
    for _ in range(learn.inner_epochs):
        for cut in cuts(len(own), len(credit.advantages), learn):
            known = _informative(credit, cut, len(own))
            share = objective.share(known)
            batches = _batches(rollout, mine, objective, cut, learn.rows, share, telling)
            yield Update(list(batches), not known.any() and not objective.learns_from_idle())


def _informative(credit: Credit, cut: _Cut, trunks: int) -> Tensor:
    """The groups (forks, processes, trunks) bool that an optimizer step takes, over all processes of R trunks each."""
    everyone = credit.informative.view(len(credit.informative), -1, trunks)
    return everyone[cut.forks.start : cut.forks.stop, :, cut.trunks.start : cut.trunks.stop]


def _batches(
    rollout: Rollout, credit: Credit, objective: Objective, cut: _Cut, rows: int, share: float, telling: Tensor
) -> Iterator[TransitionBatch]:
    """The batches of one optimizer step: chunk of trunks by chunk of trunks, decision by decision.

    Args:
        telling: groups (S, R) bool without which a batch is left out, where it has no gradient then.
    """
    siblings, taken = credit.advantages.shape[2], [d for d in rollout.decisions if d.fork in cut.forks]
    total = sum(len(cut.trunks) * siblings for _ in taken)
    for part in chunks(len(cut.trunks), rows):
        for decision in taken:
            per_trunk = len(decision.steps) // credit.advantages.shape[1]  # 1, or K later in a window
            first, end = ((cut.trunks.start + edge) * per_trunk for edge in (part.start, part.stop))
            terms = objective.rows(decision.steps, telling[decision.fork].repeat_interleave(per_trunk))
            pieces = [slice(first + piece.start, first + piece.stop) for piece in chunks(end - first, rows)]
            for here in (piece for piece in pieces if objective.learns(terms[piece])):
                count = (here.stop - here.start) * decision.siblings
                yield _batch(decision, credit, objective, here, share * count / total)


def _batch(decision: Decision, credit: Credit, objective: Objective, here: slice, share: float) -> TransitionBatch:
    """Some rows of a decision; a branch's advantage belongs to every decision of its window."""
    rows = len(decision.steps)
    informative = credit.informative[decision.fork].repeat_interleave(rows // credit.informative.shape[1])
    return TransitionBatch(
        steps=decision.steps[here],
        latents=decision.latents[here],
        velocity_old=decision.velocity[here],
        keys=decision.keys[here],
        advantages=credit.advantages[decision.fork].reshape(rows, decision.siblings)[here],
        terms=objective.rows(decision.steps[here], informative[here]),
        conditioning=decision.conditioning(here),
        share=share,
    )
