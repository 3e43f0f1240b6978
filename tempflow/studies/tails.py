"""What fast tails do to the rewards: one iteration's branches followed both ways, exactly and as the run will.

    python -m tempflow.commands.tails [PRESET or FILE.yaml] [section.field=value ...]

takes the arguments of `train.py`, trains nothing and leaves no files; with `tails.check=true` a run does the same
before its first iteration. Adapters that have learnt nothing yet hide what merging them changes: give `model.lora`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tempflow.common.clock import PhaseClock
from tempflow.explore.rollout import FinishedBranches, Rollout, explore, finish_branches
from tempflow.explore.tails.engine import EagerEngine, TailEngine
from tempflow.run.trainer import Trainer


@dataclass(frozen=True)
class TailsCheck:
    """Fast tails against exact ones: Euler on every sigma, plain network calls in the numerics of training."""

    branches: int
    rank_correlation: float
    """Spearman's, of the rewards of siblings, mean over groups that vary both ways; NaN if none does"""
    groups: int
    """groups that vary both ways"""
    reward_error: float
    """mean absolute difference"""
    latent_error: float
    """root mean square of the difference over that of the exact latents"""
    seconds: float
    exact_seconds: float

    def describe(self) -> str:
        return (
            f"tails check over {self.branches} branches: rank correlation of siblings' rewards "
            f"{self.rank_correlation:.4f} (mean of {self.groups} groups), rewards differ by {self.reward_error:.2e} on "
            f"average, latents by {100 * self.latent_error:.3g} % (RMS); {self.seconds:.2f} s, exactly "
            f"{self.exact_seconds:.2f} s"
        )


@torch.no_grad()
def check_tails(trainer: Trainer) -> TailsCheck:
    """Carries the branches of the first iteration both ways. Moves nothing but this process's clock.

    Of several tails the last is looked at.
    """
    config, policy = trainer.config, trainer.policy
    plan = trainer.method.plan(config.run.seed, 0, config.explore.prompts).of(trainer.feed.slots)
    prompts, draw = trainer.feed.at(0)
    of_trunks = [prompt for prompt in prompts for _ in range(plan.noises)]
    conditioning = policy.encode([prompt.text for prompt in of_trunks])
    with trainer.numerics():
        rollout = explore(policy, trainer.schedule, plan, draw, conditioning, config.learn.rows)
    policy.refresh_merged()
    groups = (-1, *rollout.branches.shape[:3])  # of every scorer
    seconds, found, fast_engine = {}, {}, trainer.tails[-1]
    for name, engine in (("exact", EagerEngine(policy, fast_engine.rows)), ("fast", fast_engine)):
        clock = PhaseClock(policy.device)
        with clock(name):
            finished = _finished(engine, rollout, trainer)
        seconds |= clock.read()
        trainer.scores.submit(finished, of_trunks)
        found[name] = finished.latents, trainer.scores.collect().view(groups)
    fast_engine.work.read()
    trainer.clock.read()
    (exact_latents, exact), (fast_latents, fast) = found["exact"], found["fast"]
    correlations = rank_correlations(exact, fast)
    return TailsCheck(
        branches=len(exact_latents),
        rank_correlation=correlations.nanmean().item(),
        groups=int(correlations.isfinite().sum()),
        reward_error=(fast - exact).abs().nanmean().item(),
        latent_error=((fast_latents - exact_latents).square().mean() / exact_latents.square().mean()).sqrt().item(),
        seconds=seconds["fast"],
        exact_seconds=seconds["exact"],
    )


def _finished(engine: TailEngine, rollout: Rollout, trainer: Trainer) -> FinishedBranches:
    """All branches at the end of their tails."""
    chunks = list(finish_branches([engine], rollout, trainer.schedule))
    trunks = [row for chunk in chunks for row in chunk.trunks]
    return FinishedBranches(torch.cat([c.latents for c in chunks]), trunks, torch.cat([c.places for c in chunks]))


def rank_correlations(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's rank correlation over the last axis of (..., K) values; NaN where one side does not vary."""
    first, second = (_ranks(values) for values in (first, second))
    first, second = (ranks - ranks.mean(-1, keepdim=True) for ranks in (first, second))
    return (first * second).sum(-1) / (first.square().sum(-1) * second.square().sum(-1)).sqrt()


def _ranks(values: Tensor) -> Tensor:
    """Ranks over the last axis, from 1; equal values share the mean of theirs."""
    below = (values.unsqueeze(-2) < values.unsqueeze(-1)).sum(-1)
    equal = (values.unsqueeze(-2) == values.unsqueeze(-1)).sum(-1)
    return below + (equal + 1) / 2
