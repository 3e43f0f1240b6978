"""What fast tails do to the rewards: one iteration's branches carried both ways, exactly and as the run will.

    python -m tempflow.commands.tails [PRESET or FILE.yaml] [section.field=value ...]

takes the arguments of `train.py`, trains nothing and leaves no files; with `tails.check=true` a run does the same
before its first iteration. Adapters that have learnt nothing yet hide what merging them changes: give `model.lora`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tempflow.common.clock import PhaseClock
from tempflow.explore.rollout import Trunk, sample_branches, sample_trunk
from tempflow.explore.tails.engine import EagerEngine, TailEngine
from tempflow.run.trainer import Run


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
def check_tails(run: Run) -> TailsCheck:
    """Carries the branches of the first iteration both ways. Moves nothing but this rank's clock."""
    plan = run.plan.drawn(run.config.run.seed, 0)
    prompts, draw = run.prompts_of(0)
    conditioning = run.policy.encode([prompt.text for prompt in prompts])
    with run.numerics():
        trunk = sample_trunk(run.policy, conditioning, run.schedule, plan, draw, run.config.learn.rows)
    run.policy.refresh_merged()
    groups = (-1, len(plan.steps), len(prompts), plan.siblings)  # of every scorer
    seconds, found = {}, {}
    for name, engine in (("exact", EagerEngine(run.policy, run.engine.rows)), ("fast", run.engine)):
        clock = PhaseClock(run.policy.device)
        with clock(name):
            latents, trunks = _carried(engine, trunk, run)
        seconds |= clock.read()
        run.scores.submit(latents, [prompts[row] for row in trunks])
        found[name] = latents, run.scores.collect().view(groups)
    run.engine.work.read()
    run.clock.read()
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


def _carried(engine: TailEngine, trunk: Trunk, run: Run) -> tuple[Tensor, list[int]]:
    """Finished latents of all branches (S R K, D...), and the trunk of each."""
    chunks = list(sample_branches(engine, trunk, run.schedule))
    return torch.cat([chunk.latents for chunk in chunks]), [row for chunk in chunks for row in chunk.trunks]


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
