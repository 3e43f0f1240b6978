"""Exploring: one deterministic trunk per initial noise, the stochastic decisions that fork from it, and their tails.

At a fork K siblings take `window` stochastic steps from one trunk state, then follow the ODE to an image. What their
rewards differ by belongs to those decisions (TempFlow-GRPO, section "trajectory branching"). Siblings share the network
row of their first decision; from the second on each has a row of its own.

Deviations from the released code, none of which changes a number: the trunk runs first and alone, in the numerics of
training; the branches of all trunks and forks travel in chunks of one size (the last may be shorter), each chunk from
its fork to the image at once, so that decoding and scoring it can go on beside the next; a trunk's velocity is at once
its ODE step, the mean of the K stochastic steps and the old policy's velocity.

Axes: S forks, R rows (trunks), K siblings, B rows of a decision, V tails per branch, D... one latent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from tempflow_kernels import transition_step
from torch import Tensor

from tempflow.common.draws import Draw
from tempflow.common.say import say
from tempflow.common.tensors import chunks, to_device
from tempflow.explore.plan import Plan
from tempflow.explore.schedule import NoiseSchedule, ode_step
from tempflow.explore.tails.engine import TailEngine
from tempflow.policy import Conditioning, Policy


@dataclass(frozen=True)
class Decision:
    """One stochastic step that B rows take: what learning repeats. Stored once per row, not once per sibling.

    Example: 8 trunks, K = 6, window 2: the first decision of a fork has B = 8 rows of 6 siblings, the second 48 of 1.
    """

    fork: int
    steps: Tensor
    """(B,) int64 on the host"""
    latents: Tensor
    """(B, D...) fp32: the state it is taken from"""
    velocity: Tensor
    """(B, D...) fp32: the sampling policy's velocity there"""
    keys: Tensor
    """(B, 2) int64: what the siblings' noise is a function of"""
    siblings: int
    """K where a window begins, 1 later"""
    trunks: Conditioning
    """R rows: of the trunks that the rows belong to, B / R rows each; copied only for the calls that need them"""

    def conditioning(self, here: slice) -> Conditioning:
        """That of some of the B rows."""
        per_trunk = len(self.steps) // len(self.trunks)
        if per_trunk == 1:
            return self.trunks.rows(here)
        rows = torch.arange(here.start, here.stop) // per_trunk
        return self.trunks.rows(to_device(rows, self.latents.device))


@dataclass(frozen=True)
class Rollout:
    """The decisions of one iteration, and where their tails begin. Example: S = 9, window 1: 9 decisions."""

    decisions: tuple[Decision, ...]
    """S x window, fork by fork"""
    branches: Tensor
    """(S, R, K, D...) fp32: the state in which each sibling leaves its window"""
    first_steps: Tensor
    """(S, R) int64 on the host: the first step of its tail"""
    conditioning: Conditioning
    """R rows"""


@dataclass(frozen=True)
class FinishedBranches:
    """B branches at the end of their tails, in the order in which they travelled."""

    latents: Tensor
    """(B, D...) fp32"""
    trunks: list[int]
    """B: the trunk that each left"""
    places: Tensor
    """(B,) int64 on the host: where each stands in (V, S, R, K), flattened"""


@torch.no_grad()
def explore(
    policy: Policy, schedule: NoiseSchedule, plan: Plan, draw: Draw, conditioning: Conditioning, rows: int
) -> Rollout:
    """Follows R trunks to their last fork and takes every decision of `plan`, `rows` rows a network call.

    Args:
        conditioning: R rows. draw: of R rows.
    """
    steps = plan.trunk_steps()
    latents, velocities = _follow_trunks(policy, schedule, steps, draw, conditioning, rows)
    branches = latents.new_empty(*steps.shape, plan.siblings, *policy.latent_shape)
    decisions: list[Decision] = []
    for fork, at in enumerate(steps):
        keys = draw.step_keys(at).to(policy.device)
        decision = Decision(fork, at, latents[fork], velocities[fork], keys, plan.siblings, conditioning)
        decisions.append(decision)
        state = stochastic_step(decision, schedule)
        for _ in range(plan.window - 1):
            decision = _following(policy, schedule, draw, decision, state, rows)
            decisions.append(decision)
            state = stochastic_step(decision, schedule)
        branches[fork] = state.view_as(branches[fork])
    return Rollout(tuple(decisions), branches, _after_window(steps, plan.window, schedule), conditioning)


def _follow_trunks(
    policy: Policy, schedule: NoiseSchedule, steps: Tensor, draw: Draw, conditioning: Conditioning, rows: int
) -> tuple[Tensor, Tensor]:
    """States and velocities (S, R, D...) at the forks (S, R) of R trunks."""
    initial = draw.initial_noise(policy.latent_shape, policy.device)
    latents = initial.new_empty(len(steps), *initial.shape)
    velocities = torch.empty_like(latents)
    for part in chunks(len(initial), rows):
        state, texts, forks = initial[part], conditioning.rows(part), steps[:, part]
        for step in range(int(forks.max()) + 1):
            sigma = schedule.sigma_rows(torch.full((len(state),), step), policy.device)
            velocity = policy.velocity(state, sigma, texts)
            for fork in (forks == step).any(1).nonzero().flatten().tolist():
                here = to_device((forks[fork] == step).nonzero().flatten(), policy.device)
                latents[fork, part.start + here], velocities[fork, part.start + here] = state[here], velocity[here]
            state = ode_step(state, velocity, schedule, step)
    return latents, velocities


def stochastic_step(decision: Decision, schedule: NoiseSchedule) -> Tensor:
    """Where the siblings of a decision arrive: (B K, D...) fp32."""
    coef = schedule.sde.coef(decision.steps, decision.latents.device)
    following, _ = transition_step(decision.latents, decision.velocity, coef, decision.keys, decision.siblings)
    return following.flatten(0, 1)


def _following(
    policy: Policy, schedule: NoiseSchedule, draw: Draw, before: Decision, state: Tensor, rows: int
) -> Decision:
    """The next decision of a window, from the (B K, D...) states that the one before led to."""
    siblings = len(state) // len(draw.slots)
    now = before.steps + schedule.jumps[before.steps]
    steps = now.repeat_interleave(before.siblings)
    keys = sibling_keys(draw.step_keys(steps[::siblings]), siblings, state[0].numel()).to(policy.device)
    decision = Decision(before.fork, steps, state, torch.empty_like(state), keys, 1, before.trunks)
    for part in chunks(len(state), rows):
        sigma = schedule.sigma_rows(steps[part], policy.device)
        decision.velocity[part] = policy.velocity(state[part], sigma, decision.conditioning(part))
    return decision


def sibling_keys(keys: Tensor, siblings: int, elements: int) -> Tensor:
    """(R, 2) keys of rows that draw K times -> (R K, 2) keys of K rows that draw once, of the very same noise.

    Sibling j of a row draws from counter j ceil(d / 4) on (`tempflow_kernels.normal_like`).
    """
    offsets = torch.arange(siblings) * -(-elements // 4)
    return torch.stack((keys[:, :1].expand(-1, siblings), keys[:, 1:] + offsets), 2).flatten(0, 1)


def _after_window(steps: Tensor, window: int, schedule: NoiseSchedule) -> Tensor:
    for _ in range(window):
        steps = steps + schedule.jumps[steps]
    return steps


@torch.no_grad()
def finish_branches(
    tails: Sequence[TailEngine], rollout: Rollout, schedule: NoiseSchedule, may_halve: bool = False
) -> Iterator[FinishedBranches]:
    """Carries every branch to its image, once with each of the V tails, chunk by chunk in the order they set out.

    Args:
        may_halve: where memory runs out, chunks have half the size from then on, once; not where processes have to
            make as many calls of the network as one another.
    """
    _, trunks, siblings = rollout.branches.shape[:3]
    states = rollout.branches.flatten(0, 2)
    first_steps = rollout.first_steps.flatten().repeat_interleave(siblings)
    order = torch.argsort(first_steps, stable=True)
    for tail, engine in enumerate(tails):
        begun = 0
        while begun < len(order):
            places = order[begun : begun + engine.rows]
            owners = places // siblings % trunks
            latents = states[to_device(places, states.device)]
            conditioning = rollout.conditioning.rows(to_device(owners, states.device))
            first = first_steps[places].tolist()
            work = partial(engine.finish, latents, first, conditioning, schedule)
            if not _fits(work, len(places), tails if may_halve else ()):
                continue  # the same branches from where they set out, fewer at once
            begun += len(places)
            yield FinishedBranches(latents, owners.tolist(), tail * len(order) + places)


def _fits(work: Callable[[], None], size: int, tails: Sequence[TailEngine]) -> bool:
    """Does the work of `size` branches; False where memory ran out and the chunks of `tails` have been halved."""
    try:
        work()
    except torch.OutOfMemoryError:
        halved = [engine.halve(size) for engine in tails]
        if not halved or not all(halved):
            raise
        torch.cuda.empty_cache()
        words = f"memory ran out in tails: {tails[0].rows} branches travel together from here on (tails.rows)"
        say(f"warning: {words}", everywhere=True)
        return False
    return True
