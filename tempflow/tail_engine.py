"""The fast path of ODE tails. No gradient and no log-probability depends on its precision, only the reward does."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from tempflow_kernels import transition_step
from torch import Tensor

from tempflow.policy import Conditioning, Policy
from tempflow.schedule import NoiseSchedule


class TailEngine(Protocol):
    """Carries branches along the ODE to the end."""

    rows: int
    """branches that travel together at most"""

    def finish(
        self, latents: Tensor, first_steps: Sequence[int], conditioning: Conditioning, schedule: NoiseSchedule
    ) -> None:
        """All remaining ODE steps of B branches, in place.

        Args:
            latents: (B, D...) fp32, B at most `rows`; overwritten with the finished latents.
            first_steps: the step at which each branch sets out, ascending.
            conditioning: B rows.
        """
        ...


def ode_step(latents: Tensor, velocity: Tensor, schedule: NoiseSchedule, step: int) -> Tensor:
    """One deterministic step of (R, D...) latents."""
    coef = schedule.ode.coef(step, len(latents), latents.device)
    no_noise = torch.zeros(len(latents), 2, dtype=torch.int64, device=latents.device)
    return transition_step(latents, velocity, coef, no_noise)[0][:, 0]


@dataclass(frozen=True)
class EagerEngine:
    """Plain network calls in the numerics of training; branches that have not set out yet cost nothing."""

    policy: Policy
    rows: int

    @torch.no_grad()
    def finish(
        self, latents: Tensor, first_steps: Sequence[int], conditioning: Conditioning, schedule: NoiseSchedule
    ) -> None:
        for step in range(first_steps[0], schedule.num_steps):
            alive = slice(bisect_right(first_steps, step))
            sigma = schedule.sigma_rows(step, alive.stop, latents.device)
            velocity = self.policy.velocity(latents[alive], sigma, conditioning.rows(alive))
            latents[alive] = ode_step(latents[alive], velocity, schedule, step)
