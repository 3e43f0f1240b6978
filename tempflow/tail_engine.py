"""The fast path of ODE tails. No gradient and no log-probability depends on its precision, only the reward does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from tempflow_kernels import transition_step
from torch import Tensor

from tempflow.batching import chunks
from tempflow.policy import Conditioning, Policy
from tempflow.schedule import NoiseSchedule


class TailEngine(Protocol):
    """Advances finished forks along the ODE."""

    def advance(self, latents: Tensor, step: int, conditioning: Conditioning, row_of: Tensor) -> None:
        """One ODE step of B branches, in place.

        Args:
            latents: (B, D...) fp32, overwritten.
            step: index of the step, the same for all.
            conditioning: R rows; row_of: (B,) int64, the row of each branch.
        """
        ...


@dataclass(frozen=True)
class EagerEngine:
    """Plain network calls of at most `rows` branches each."""

    policy: Policy
    schedule: NoiseSchedule
    rows: int

    @torch.no_grad()
    def advance(self, latents: Tensor, step: int, conditioning: Conditioning, row_of: Tensor) -> None:
        no_noise = torch.zeros(self.rows, 2, dtype=torch.int64, device=latents.device)
        coef = self.schedule.ode.coef(step, self.rows, latents.device)
        for part in chunks(len(latents), self.rows):
            count = part.stop - part.start
            sigma = self.schedule.sigma_rows(step, count, latents.device)
            velocity = self.policy.velocity(latents[part], sigma, conditioning.rows(row_of[part]))
            latents[part] = transition_step(latents[part], velocity, coef[:count], no_noise[:count])[0][:, 0]
