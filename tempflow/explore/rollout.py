"""Trajectory branching: one deterministic trunk per initial noise, then all its branches in chunks.

At each fork step k the K siblings of a trunk take one stochastic step from the same state x_k with the same velocity,
then follow the ODE to an image; the difference of their rewards belongs to that one step (TempFlow-GRPO, section
"trajectory branching").

Deviations from the released code, none of which changes a number: the trunk runs first and alone, in the numerics of
training; the branches of all trunks and forks travel in chunks of one size (the last may be shorter), each chunk from
its fork to the image at once, so that decoding and scoring it can go on beside the next; a trunk's velocity is at once
its ODE step, the mean of the K stochastic steps and the old policy's velocity.

Axes: S fork steps, R rows (trunks), K siblings, D... one latent. Fork steps lead, so that the branches of a chunk share
their fork step, except where one fork's branches end and the next one's begin.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tempflow_kernels import transition_step
from torch import Tensor

from tempflow.common.draws import Draw
from tempflow.common.tensors import chunks, to_device
from tempflow.explore.plan import BranchPlan
from tempflow.explore.schedule import NoiseSchedule, ode_step
from tempflow.explore.tails.engine import TailEngine
from tempflow.policy import Conditioning, Policy


@dataclass(frozen=True)
class Trunk:
    """The states from which siblings fork. Stored once per trunk, not once per sibling."""

    latents: Tensor
    """(S, R, D...) fp32: x_k at each fork"""
    velocity: Tensor
    """(S, R, D...) fp32: the sampling policy's velocity there"""
    keys: Tensor
    """(S, R, 2) int64: what the siblings' noise is a function of"""
    conditioning: Conditioning
    """R rows"""
    plan: BranchPlan


@dataclass(frozen=True)
class FinishedBranches:
    """B branches at the end of their tails, consecutive in the order (S, R, K)."""

    latents: Tensor
    """(B, D...) fp32"""
    trunks: list[int]
    """B rows: the trunk that each left"""


@torch.no_grad()
def sample_trunk(
    policy: Policy, conditioning: Conditioning, schedule: NoiseSchedule, plan: BranchPlan, draw: Draw, rows: int
) -> Trunk:
    """Follows the ODE from R initial noises to the last fork, `rows` trunks a call, and keeps each fork's state."""
    device = policy.device
    initial = draw.initial_noise(policy.latent_shape, device)
    latents = torch.empty(len(plan.steps), *initial.shape, device=device)
    velocities = torch.empty_like(latents)
    for part in chunks(len(initial), rows):
        state, prompts = initial[part], conditioning.rows(part)
        for step in range(plan.steps[-1] + 1):
            sigma = schedule.sigma_rows(step, len(state), device)
            velocity = policy.velocity(state, sigma, prompts)
            if step in plan.steps:
                fork = plan.steps.index(step)
                latents[fork, part], velocities[fork, part] = state, velocity
            state = ode_step(state, velocity, schedule, step)
    keys = torch.stack([draw.step_keys(step) for step in plan.steps]).to(device)
    return Trunk(latents, velocities, keys, conditioning, plan)


def fork_siblings(trunk: Trunk, schedule: NoiseSchedule) -> Tensor:
    """The stochastic step of all K siblings at every fork: (S, R, K, D...) fp32."""
    plan, (forks, rows, *latent_shape) = trunk.plan, trunk.latents.shape
    coef = torch.cat([schedule.sde.coef(step, rows, trunk.latents.device) for step in plan.steps])
    forked, _ = transition_step(
        trunk.latents.flatten(0, 1), trunk.velocity.flatten(0, 1), coef, trunk.keys.flatten(0, 1), plan.siblings
    )
    return forked.view(forks, rows, plan.siblings, *latent_shape)


@torch.no_grad()
def sample_branches(engine: TailEngine, trunk: Trunk, schedule: NoiseSchedule) -> Iterator[FinishedBranches]:
    """Forks every trunk at every step of its plan and carries the branches to the end, chunk by chunk."""
    plan, (forks, rows, *latent_shape) = trunk.plan, trunk.latents.shape
    branches = fork_siblings(trunk, schedule).view(-1, *latent_shape)
    first_steps = [step + 1 for step in plan.steps for _ in range(rows * plan.siblings)]
    trunks = torch.arange(rows).repeat_interleave(plan.siblings).repeat(forks)
    indices = to_device(trunks, branches.device)
    for part in chunks(len(branches), engine.rows):
        conditioning = trunk.conditioning.rows(indices[part])
        engine.finish(branches[part], first_steps[part], conditioning, schedule)
        yield FinishedBranches(branches[part], trunks[part].tolist())


