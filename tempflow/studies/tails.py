"""What fast tails and a light decoder do to the rewards: one iteration's branches, exactly and as the run will.

    tempflow tails [PRESET or FILE.yaml] [section.field=value ...]

takes the arguments of `train.py`, trains nothing and leaves no files; with `tails.check=true` a run does the same
before its first iteration. Adapters that have learnt nothing yet hide what merging them changes: give `model.lora`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tempflow.common.clock import PhaseClock
from tempflow.credit.scoring import ScoreQueue
from tempflow.explore.rollout import FinishedBranches, Rollout, explore, finish_branches
from tempflow.explore.tails.engine import EagerEngine, TailEngine
from tempflow.prompts import Prompt
from tempflow.run.trainer import Trainer


@dataclass(frozen=True)
class Agreement:
    """Rewards of the same branches, computed in another way, against the exact ones."""

    siblings: float
    """Spearman's rank correlation within groups of siblings, mean over those that vary both ways; NaN if none does"""
    groups: int
    """groups that vary both ways"""
    branches: float
    """Spearman's over all branches, mean over scorers: prompts that differ in reward make it high"""
    error: float
    """mean absolute difference"""

    def describe(self) -> str:
        return (
            f"rank correlation of siblings' rewards {self.siblings:.4f} (mean of {self.groups} groups), of all "
            f"branches' {self.branches:.4f}; rewards differ by {self.error:.2e} on average"
        )


@dataclass(frozen=True)
class TailsCheck:
    """The present settings against exact ones: Euler on every sigma, plain network calls in the numerics of training,
    and the model's own decoder."""

    branches: int
    present: Agreement
    """everything as the run will do it"""
    causes: dict[str, Agreement]
    """with a light decoder, what each part does by itself: `tails`, and on exact latents `decoder`"""
    latent_error: float
    """root mean square of the difference over that of the exact latents"""
    seconds: float
    exact_seconds: float

    def describe(self) -> str:
        lines = [
            f"tails check over {self.branches} branches: {self.present.describe()}, latents by "
            f"{100 * self.latent_error:.3g} % (RMS); {self.seconds:.2f} s, exactly {self.exact_seconds:.2f} s"
        ]
        return "\n".join(lines + [f"  {name} alone: {found.describe()}" for name, found in self.causes.items()])


@torch.no_grad()
def check_tails(trainer: Trainer) -> TailsCheck:
    """Carries the branches of the first iteration both ways. Moves nothing but this process's clock.

    Of several tails the last is looked at.
    """
    rollout, prompts = _first_rollout(trainer)
    fast_engine = trainer.tails[-1]
    exact, exact_seconds = _finished(EagerEngine(trainer.policy, fast_engine.rows), rollout, trainer)
    fast, seconds = _finished(fast_engine, rollout, trainer)
    fast_engine.work.read()
    own = ScoreQueue(trainer.decoder, trainer.rewards, trainer.scores.rows, trainer.clock, overlap=False)
    groups = (-1, *rollout.branches.shape[:3])  # of every scorer

    def rewards(queue: ScoreQueue, finished: FinishedBranches) -> Tensor:
        queue.submit(finished, prompts)
        return queue.collect().view(groups)

    expected = rewards(own, exact)
    causes = {}
    if trainer.config.tails.decoder is not None:
        causes = {"tails": compare(expected, rewards(own, fast)),
                  "decoder": compare(expected, rewards(trainer.scores, exact))}  # fmt: skip
    present = compare(expected, rewards(trainer.scores, fast))
    trainer.clock.read()
    error = (fast.latents - exact.latents).square().mean() / exact.latents.square().mean()
    return TailsCheck(len(exact.latents), present, causes, error.sqrt().item(), seconds, exact_seconds)


def _first_rollout(trainer: Trainer) -> tuple[Rollout, list[Prompt]]:
    """The branches of the first iteration, and the prompts of its trunks."""
    config, policy = trainer.config, trainer.policy
    plan = trainer.method.plan(config.run.seed, 0, config.explore.prompts).of(trainer.feed.slots)
    prompts, draw = trainer.feed.at(0)
    of_trunks = [prompt for prompt in prompts for _ in range(plan.noises)]
    conditioning = policy.encode([prompt.text for prompt in of_trunks])
    with trainer.numerics():
        rollout = explore(policy, trainer.schedule, plan, draw, conditioning, config.learn.rows)
    policy.refresh_merged()
    return rollout, of_trunks


def _finished(engine: TailEngine, rollout: Rollout, trainer: Trainer) -> tuple[FinishedBranches, float]:
    """All branches at the end of their tails, and the seconds these took."""
    clock = PhaseClock(trainer.policy.device)
    with clock("tails"):
        parts = list(finish_branches([engine], rollout, trainer.schedule))
    trunks = [row for part in parts for row in part.trunks]
    latents, places = torch.cat([part.latents for part in parts]), torch.cat([part.places for part in parts])
    return FinishedBranches(latents, trunks, places), clock.read()["tails"]


def compare(exact: Tensor, other: Tensor) -> Agreement:
    """How (M, S, R, K) rewards of M scorers agree with the exact ones; NaN is no opinion."""
    siblings = rank_correlations(exact, other)
    branches = [_over_known(*pair) for pair in zip(exact.flatten(1), other.flatten(1), strict=True)]
    return Agreement(
        siblings=siblings.nanmean().item(),
        groups=int(siblings.isfinite().sum()),
        branches=torch.stack(branches).nanmean().item(),
        error=(other - exact).abs().nanmean().item(),
    )


def _over_known(*both: Tensor) -> Tensor:
    known = both[0].isfinite() & both[1].isfinite()
    return rank_correlations(*(values[known] for values in both))


def rank_correlations(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's rank correlation over the last axis of (..., K) values; NaN where one does not vary or has NaN."""
    unknown = (first + second).isnan().any(-1)
    first, second = (_ranks(values) for values in (first, second))
    first, second = (ranks - ranks.mean(-1, keepdim=True) for ranks in (first, second))
    found = (first * second).sum(-1) / (first.square().sum(-1) * second.square().sum(-1)).sqrt()
    return found.masked_fill(unknown, torch.nan)


def _ranks(values: Tensor) -> Tensor:
    """Ranks over the last axis, from 1, in float64; equal values share the mean of theirs."""
    values = values.contiguous()
    ordered = values.sort(-1).values
    below, reached = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    return (below + reached + 1).double() / 2
