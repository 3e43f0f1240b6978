"""What the loss multiplies, a row of numbers per step of the schedule: every method's objective is such a table.

    log_ratio = -(square mean(dv^2) + product mean(dv noise)),  dv = v_old - v
    loss = mean max(-weight A ratio, -weight A clip(ratio)) + kl_coef mean kl mean((v - v_ref)^2)

Sources: the Gaussian's ratio and its KL, Flow-GRPO (arXiv 2505.05470); noise weights, TempFlow-GRPO (2508.04324); the
ratio without its quadratic term, GRPO-Guard (2510.22319); the undivided one, Flow-CPS (2509.05952); the inverse of the
sensitivity, Flash-GRPO (2605.15980).
Deviations: weights have mean 1 over the steps of the schedule that are trained. TempFlow-GRPO's released code has a
constant that is right for one schedule each, GRPO-Guard's divides by the step size without a mean, Flash-GRPO's by the
mean over the steps that happened to be drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tempflow.common.errors import BadInput
from tempflow.explore.schedule import NoiseSchedule, Transition
from tempflow.settings.fields import ObjectiveConfig

WEIGHT, SQUARE, PRODUCT, KL = range(4)

WEIGHTINGS: dict[str, Callable[[NoiseSchedule], Tensor]] = {
    "noise": lambda schedule: schedule.sde.std,
    "uniform": lambda schedule: torch.ones_like(schedule.sde.std),
    "inverse_step": lambda schedule: 1 / schedule.step_sizes(),
    "inverse_sensitivity": lambda schedule: schedule.sde.std / schedule.sde.v_coef.abs(),
}
"""(T,) weights of the policy loss per step, up to a factor."""

RATIOS: dict[str, Callable[[Transition], tuple[Tensor, Tensor]]] = {
    "gaussian": lambda sde: ((sde.v_coef / sde.std).square() / 2, sde.v_coef / sde.std),
    "guard": lambda sde: (torch.zeros_like(sde.std), sde.v_coef),
    "undivided": lambda sde: (sde.v_coef.square(), 2 * sde.v_coef * sde.std),
}
"""(T,) square and product of the log-ratio per step."""

KL_DIVISORS: dict[str, Callable[[NoiseSchedule], Tensor]] = {
    "std": lambda schedule: torch.ones_like(schedule.sde.std),
    "diffusion": lambda schedule: schedule.step_sizes(),
}
"""(T,) factors of the Gaussian KL: over 2 std^2, or over 2 g^2 with std^2 = g^2 dt."""


@dataclass(frozen=True)
class Objective:
    """Example: T = 10, TempFlow-GRPO on SD3.5: `terms[0]` is (1.577, .0016, -.057, .0016), the last row 0."""

    terms: Tensor
    """(T, 4) float64: weight, square, product, kl; zeros at steps that are never trained"""
    clip: float
    """ratios are clipped to 1 +- this"""
    kl: float
    """weight of the KL divergence to the model before training"""
    silenced: tuple[int, ...] = (WEIGHT,)
    """the columns that are 0 in a group that tells nothing"""

    def rows(self, steps: Tensor, informative: Tensor) -> Tensor:
        """(B,) int64 steps and (B,) bool, on the host -> (B, 4) fp32."""
        terms = self.terms[steps].float()
        terms[:, list(self.silenced)] *= informative[:, None]
        return terms

    def learns(self, terms: Tensor) -> bool:
        """Whether (B, 4) rows have any gradient."""
        return bool(terms[:, WEIGHT].any()) or (self.kl > 0 and bool(terms[:, KL].any()))

    def learns_from_idle(self) -> bool:
        """Whether groups that tell nothing have a gradient, that of the KL divergence."""
        return self.kl > 0 and KL not in self.silenced

    def share(self, informative: Tensor) -> float:
        """The factor on the mean over all rows that makes it the mean over those that count; `informative` is bool."""
        dropped = KL in self.silenced
        return informative.numel() / max(1, int(informative.sum())) if dropped else 1.0


IDLE = {"keep": (WEIGHT,), "drop": (WEIGHT, KL)}
"""The silenced columns by the values of credit.idle: idle groups stay in the averages, or are dropped from them."""


def make_objective(
    config: ObjectiveConfig, schedule: NoiseSchedule, trained: Sequence[int], idle: str = "keep"
) -> Objective:
    """The table of `config` for the steps of `schedule` that are `trained`.

    Args:
        idle: a name of IDLE.
    Raises:
        BadInput: a step without noise, a list of weights of another length, or a KL divisor that does not exist.
    """
    places, sde = list(trained), schedule.sde
    silent = [step for step in places if not sde.std[step] > 0]
    if silent:
        hint = f"the transition has no std at step {silent[0]}, which objective.ratio={config.ratio} needs"
        raise BadInput("sample.noise_level", float(sde.std[silent[0]]), hint)
    chosen = Transition(*(column[places] for column in (sde.x_coef, sde.v_coef, sde.std)))
    square, product = RATIOS[config.ratio](chosen)
    gaussian_square, _ = RATIOS["gaussian"](chosen)
    terms = torch.zeros(schedule.num_steps, 4, dtype=torch.float64)
    kl = gaussian_square * KL_DIVISORS[config.kl_divisor](schedule)[places]
    terms[places] = torch.stack((_weights(config, schedule, places), square, product, kl), 1)
    return Objective(terms, config.clip, config.kl, IDLE[idle])


def _weights(config: ObjectiveConfig, schedule: NoiseSchedule, trained: list[int]) -> Tensor:
    """(trained steps,) float64 with mean 1; a list stands as it is given."""
    if isinstance(config.weighting, str):
        weights = WEIGHTINGS[config.weighting](schedule)[trained]
        return weights / weights.mean()
    if len(config.weighting) != schedule.num_steps - 1:
        hint = f"give {schedule.num_steps - 1} numbers, one for each step but the last, or a name"
        raise BadInput("objective.weighting", config.weighting, hint)
    weights = torch.tensor(config.weighting, dtype=torch.float64)[trained]
    if not weights.all():
        step = trained[int((weights == 0).nonzero()[0])]
        hint = f"step {step} is trained and needs a weight above 0; to leave it out, take it from explore.forks"
        raise BadInput("objective.weighting", config.weighting, hint)
    return weights
