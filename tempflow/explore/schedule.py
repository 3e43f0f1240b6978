"""Sigmas to coefficient tables: the paper's SDE mathematics, once, in float64 on the host.

Notation: s = sigma_i, s' = sigma_{i+1}, D = s - s' > 0; x = (1 - s) * data + s * noise, velocity v = noise - data.
Every sampler is `next = x_coef * x + v_coef * v + std * noise` with scalars per step.

Sources: Flow-SDE, Flow-GRPO (arXiv 2505.05470) eq. 8-9; Dance-SDE, DanceGRPO (arXiv 2505.07818); CPS, Flow-CPS
(arXiv 2509.05952); noise weights, TempFlow-GRPO (arXiv 2508.04324), section "noise-aware weighting".
Deviation: the released TempFlow-GRPO code multiplies `std` by a constant (2.25, 1.73, 1.53) that is right for one
schedule each; here the weights are normalised by the mean of the schedule in use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tempflow_kernels import transition_step
from torch import Tensor

from tempflow.common.errors import BadInput
from tempflow.common.tensors import to_device

Level = float | Tensor
"""Noise of a transition: one for all steps, or (T,) float64."""


@dataclass(frozen=True)
class Transition:
    """Coefficients of one sampler for every step: `next = x_coef * x + v_coef * v + std * noise`."""

    x_coef: Tensor
    """(T,) float64"""
    v_coef: Tensor
    """(T,) float64"""
    std: Tensor
    """(T,) float64, 0 for a deterministic step"""

    def coef(self, steps: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """(B,) int64 steps on the host -> (B, 3) fp32 on `device`: their coefficients, as the operators take them."""
        return to_device(torch.stack((self.x_coef, self.v_coef, self.std), 1)[steps].float(), device)


def ode(sigmas: Tensor, level: Level = 0.0) -> Transition:
    """The Euler step of the probability-flow ODE. sigmas: (T+1,) float64; `level` is ignored."""
    step_size = sigmas[:-1] - sigmas[1:]
    return Transition(torch.ones_like(step_size), -step_size, torch.zeros_like(step_size))


def _langevin(sigma: Tensor, following: Tensor, diffusion: Tensor) -> Transition:
    """The SDE with the ODE's marginals and diffusion coefficient g: Euler-Maruyama with the score of the flow."""
    step_size = sigma - following
    half_rate = diffusion.square() / (2 * sigma)
    x_coef = 1 - half_rate * step_size
    v_coef = -(1 + half_rate * (1 - sigma)) * step_size
    return Transition(x_coef, v_coef, diffusion * step_size.sqrt())


def flow_sde(sigmas: Tensor, level: Level, following: Tensor | None = None) -> Transition:
    """Flow-GRPO's SDE, g = level * sqrt(s / (1 - s)); where s = 1 the second sigma of the schedule stands in for s.

    Args (of every transition):
        sigmas: (T+1,) float64, the whole schedule. level: one for all steps, or (T,).
        following: (T,) float64, the sigma that each step goes to; by default the next one, further on a merged step.
    """
    sigma = sigmas[:-1]
    diffusion = level * (sigma / (1 - torch.where(sigma == 1, sigmas[1], sigma))).sqrt()
    return _langevin(sigma, sigmas[1:] if following is None else following, diffusion)


def dance_sde(sigmas: Tensor, level: Level, following: Tensor | None = None) -> Transition:
    """DanceGRPO's SDE with a constant diffusion coefficient g = level."""
    diffusion = level * torch.ones_like(sigmas[:-1])
    return _langevin(sigmas[:-1], sigmas[1:] if following is None else following, diffusion)


def flash_sde(sigmas: Tensor, level: Level, following: Tensor | None = None) -> Transition:
    """Flash-GRPO's SDE (arXiv 2605.15980), g = level * s * (second sigma of the schedule); its released level is 1."""
    sigma = sigmas[:-1]
    return _langevin(sigma, sigmas[1:] if following is None else following, level * sigmas[1] * sigma)


def cps(sigmas: Tensor, level: Level, following: Tensor | None = None) -> Transition:
    """Coefficients-preserving sampling: std = s' |sin(level pi / 2)|, the rest of s' keeps the predicted noise."""
    sigma, following = sigmas[:-1], sigmas[1:] if following is None else following
    angle = torch.as_tensor(level, dtype=torch.float64) * math.pi / 2
    kept_noise = following * angle.cos().abs()
    x_coef = (1 - following) + kept_noise
    v_coef = kept_noise * (1 - sigma) - sigma * (1 - following)
    return Transition(x_coef, v_coef, following * angle.sin().abs())


TRANSITIONS: dict[str, Callable[[Tensor, Level, Tensor], Transition]] = {
    "flow_sde": flow_sde,
    "dance_sde": dance_sde,
    "flash_sde": flash_sde,
    "cps": cps,
}


@dataclass(frozen=True)
class NoiseSchedule:
    """A sampling schedule of T steps: sigmas, the deterministic steps of trunk and tails, the stochastic ones of forks.

    Example: SD3.5 at 10 steps has sigmas 1, .9601, .9133 ... .0089, 0, and forks at level .7 have std .700, .743, ...
    """

    sigmas: Tensor
    """(T+1,) float64, falling from 1 (noise) to 0 (image)"""
    ode: Transition
    sde: Transition
    jumps: Tensor
    """(T,) int64: sigmas that a stochastic step spans; 1 but for merged steps"""

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1

    def sigma_rows(self, steps: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """(B,) int64 steps on the host -> (B,) fp32 on `device`: their sigmas."""
        return to_device(self.sigmas[steps].float(), device)

    def step_sizes(self) -> Tensor:
        """(T,) float64: what a stochastic step lowers sigma by."""
        return self.sigmas[:-1] - self.sigmas[torch.arange(self.num_steps) + self.jumps]

    def noise_weights(self, steps: Sequence[int]) -> Tensor:
        """`std_k / mean(std)` over `steps`: the weights of TempFlow-GRPO. (S,) float64."""
        std = self.sde.std[list(steps)]
        return std / std.mean()


def build_schedule(
    sigmas: Sequence[float] | Tensor, transition: str, noise_level: float | Sequence[float],
    jumps: Sequence[int] | None = None,
) -> NoiseSchedule:  # fmt: skip
    """The schedule of `sigmas` (T+1 values from the model's own scheduler) with the named stochastic transition.

    Args:
        noise_level: of all steps, or T - 1, of each step but the last.
        jumps: T, the sigmas that each stochastic step spans; by default 1.
    Raises:
        BadInput: unknown transition, sigmas that do not fall from at most 1 to 0, or a level without noise.
    """
    sigmas = torch.as_tensor(sigmas, dtype=torch.float64).cpu()
    if transition not in TRANSITIONS:
        raise BadInput("sample.transition", transition, f"choose one of {', '.join(TRANSITIONS)}")
    if not (torch.all(sigmas[:-1] > sigmas[1:]) and sigmas[0] <= 1 and sigmas[-1] == 0):
        found = sigmas.tolist()
        raise BadInput("sample.steps", len(sigmas) - 1, f"sigmas must fall from at most 1 to 0, found {found}")
    level = _levels(noise_level, transition, len(sigmas) - 1)
    reach = torch.ones(len(sigmas) - 1, dtype=torch.int64) if jumps is None else torch.tensor(jumps)
    following = sigmas[torch.arange(len(reach)) + reach]
    return NoiseSchedule(sigmas, ode(sigmas), TRANSITIONS[transition](sigmas, level, following), reach)


def _levels(noise_level: float | Sequence[float], transition: str, num_steps: int) -> Level:
    """The level of all steps, or (T,) of each: the last step, which no list names, repeats the one before."""
    listed = noise_level if isinstance(noise_level, Sequence) else [noise_level]
    if isinstance(noise_level, Sequence) and len(listed) != num_steps - 1:
        hint = f"give one number, or {num_steps - 1}, one for each step but the last"
        raise BadInput("sample.noise_level", noise_level, hint)
    if min(listed) <= 0:
        raise BadInput("sample.noise_level", noise_level, "siblings differ only by noise; give a level above 0")
    if transition == "cps" and max(listed) >= 2:
        raise BadInput("sample.noise_level", noise_level, "cps replaces all noise at 1 and none at 2; go below 2")
    return torch.tensor([*listed, listed[-1]], dtype=torch.float64) if listed is noise_level else noise_level


def ode_step(latents: Tensor, velocity: Tensor, schedule: NoiseSchedule, step: int) -> Tensor:
    """One deterministic step of (R, D...) latents."""
    coef = schedule.ode.coef(torch.full((len(latents),), step), latents.device)
    no_noise = torch.zeros(len(latents), 2, dtype=torch.int64, device=latents.device)
    return transition_step(latents, velocity, coef, no_noise)[0][:, 0]
