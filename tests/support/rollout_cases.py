"""What tests of exploring and learning set out with: forks read from settings, explored by a policy, finished."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tempflow.common.draws import Draw
from tempflow.explore.plan import ForkRule, Plan, read_forks
from tempflow.explore.rollout import Rollout, explore, finish_branches
from tempflow.explore.schedule import NoiseSchedule, build_schedule
from tempflow.explore.tails.engine import EagerEngine
from tempflow.explore.tails.solver import EXACT, TailSolver
from tempflow.settings.fields import ExploreConfig

SIGMAS = (1.0, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.278, 0.0089, 0.0)
"""SD3.5's ten steps"""
TEXTS = ("one", "three", "eleven")
SEED, ITERATION, NOISES = 7, 3, 2


def forked(prompts: int = 3, **explore: object) -> tuple[NoiseSchedule, Plan, ForkRule]:
    """The schedule, the plan of iteration 3 and the rule of `explore` settings; 2 noises, 3 siblings by default."""
    settings = ExploreConfig(**{"noises": NOISES, "siblings": 3} | explore)
    rule = read_forks(settings, len(SIGMAS) - 1)
    steps = rule.forks.at(SEED, ITERATION, prompts)
    plan = Plan(steps, rule.window, settings.noises, settings.siblings)
    return build_schedule(SIGMAS, "flow_sde", 0.7, rule.jumps), plan, rule


def explored(policy, schedule: NoiseSchedule, plan: Plan, rows: int = 4, texts: Sequence[str] = TEXTS) -> Rollout:
    """Every decision of a plan."""
    draw = Draw.grid(SEED, ITERATION, range(len(texts)), plan.noises)
    plan = plan.of(range(len(texts)))
    return explore(policy, schedule, plan, draw, policy.encode(texts).repeat(plan.noises), rows)


def finished(
    policy, schedule: NoiseSchedule, plan: Plan, rows: int = 4, tail_rows: int = 5,
    tails: Sequence[TailSolver] = (EXACT,), texts: Sequence[str] = TEXTS,
) -> Tensor:  # fmt: skip
    """(V, S, R, K, D...): the ends of all branches, each at its place."""
    rollout = explored(policy, schedule, plan, rows, texts)
    engines = [EagerEngine(policy, tail_rows, solver) for solver in tails]
    return at_their_places(engines, rollout, schedule)


def at_their_places(engines, rollout: Rollout, schedule: NoiseSchedule) -> Tensor:
    """(V, S, R, K, D...): the branches that engines have carried."""
    chunks = list(finish_branches(engines, rollout, schedule))
    shape, travelled = rollout.branches.shape, torch.cat([chunk.latents for chunk in chunks])
    images = torch.full_like(travelled, torch.nan)
    images[torch.cat([chunk.places for chunk in chunks])] = travelled
    return images.view(len(engines), *shape)
