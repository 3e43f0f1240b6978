"""Drop-in for Flow-GRPO: `from tempflow_kernels.compat.flow_grpo import sde_step_with_logprob`.

Same signature, same returned tuple, same meaning of every argument as the function of that name in
yifan123/flow_grpo, `flow_grpo/diffusers_patch/sd3_sde_with_logprob.py` (kinds `sde` and `cps`).

What differs: without `prev_sample` the noise comes from one 64-bit key drawn from `generator` (on its device) per row
instead of from `torch.randn`, so a seeded run draws other, equally distributed noise; and with `prev_sample` the
sampler's log-density is computed by the fused operator. Gradients reach `model_output` through `log_prob` and
`prev_sample_mean`; a drawn `prev_sample` carries none, in the original it does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_number, expect
from .coefficients import coefficients_preserving, flow_diffusion, reverse_sde
from .steps import (
    Sigmas,
    broadcast,
    checked_inputs,
    draw,
    exact_signature,
    log_density,
    mean_of,
    sigmas_of,
    squared_error,
    to_rows,
)  # fmt: skip


class Kind(NamedTuple):
    """One sampler: its tables, the levels it has, and what of the Gaussian log-density it reports."""

    coefficients: Callable
    """(sigmas, level) to coef (R, 3) and the std_dev_t that is returned."""
    highest: float
    """The largest level; above it the formulas have no std >= 0."""
    unit_density: bool
    """Report -(next - mean)^2 only, as Flow-CPS does, instead of the log-density."""


def _sde(sigmas: Sigmas, noise_level: float) -> tuple[Tensor, Tensor]:
    diffusion = flow_diffusion(sigmas.now, sigmas.second, noise_level)
    return reverse_sde(sigmas.now, sigmas.following, diffusion), diffusion


def _cps(sigmas: Sigmas, noise_level: float) -> tuple[Tensor, Tensor]:
    coef = coefficients_preserving(sigmas.now, sigmas.following, noise_level)
    return coef, coef[:, 2]


KINDS = {
    "sde": Kind(_sde, highest=float("inf"), unit_density=False),
    "cps": Kind(_cps, highest=2.0, unit_density=True),  # std = next sigma * sin(level pi / 2)
}


def step(kind: Kind, scheduler, model_output, timestep, sample, noise_level, prev_sample, generator):
    """One step of a kind: prev_sample, log_prob (R,), mean, std_dev_t, sqrt_dt; see `sde_step_with_logprob`."""
    check_number("noise_level", noise_level)
    expect(0 <= noise_level <= kind.highest, "noise_level", noise_level, f"a number from 0 to {kind.highest}")
    model_output, sample, prev_sample = checked_inputs(model_output, sample, prev_sample)
    sigmas = sigmas_of(scheduler, timestep, sample.shape[0])
    table, std = kind.coefficients(sigmas, noise_level)
    coef = to_rows(table, sample)
    mean = mean_of(sample, model_output, coef)
    if prev_sample is None:
        following, log_prob = draw(sample, model_output, coef, generator)
    else:
        following, log_prob = prev_sample.unsqueeze(1), None
    if log_prob is None or kind.unit_density or mean.requires_grad:  # else the draw has told it already
        density = squared_error if kind.unit_density else log_density
        log_prob = density(following, sample, model_output, coef)
    step_size = sigmas.now - sigmas.following
    return following[:, 0], log_prob[:, 0], mean, broadcast(std, sample), broadcast(step_size.sqrt(), sample)


@exact_signature
def sde_step_with_logprob(
    self,
    model_output: torch.FloatTensor,
    timestep: float | torch.FloatTensor,
    sample: torch.FloatTensor,
    noise_level: float = 0.7,
    prev_sample: torch.FloatTensor | None = None,
    generator: torch.Generator | None = None,
    sde_type: str | None = "sde",
    return_sqrt_dt: bool | None = False,
):
    """One stochastic step of a flow-matching sampler and its log-probability.

    Args:
        self: a scheduler with `sigmas` and `index_for_timestep` (FlowMatchEulerDiscreteScheduler of diffusers).
        model_output, sample: (R, D...), any float dtype; computed in fp32. timestep: one of the scheduler's timesteps
            for all rows, or R of them.
        noise_level: a >= 0, for `cps` up to 2. prev_sample: (R, D...) to evaluate instead of drawing.
        generator: source of the noise keys, or a list of R. sde_type: `sde` (Flow-GRPO) or `cps` (Flow-CPS).
        return_sqrt_dt: append sqrt(sigma - next sigma) to the result.
    Returns:
        (prev_sample, log_prob (R,), prev_sample_mean, std_dev_t[, sqrt_dt]), all fp32; the last two are (R, 1...), or
        (1, 1...) where one timestep was given.
    Raises:
        ValueError: an unknown `sde_type`, a level out of range, or tensors, timesteps or generators that do not fit.
        TypeError: a keyword that the original does not have.
    """
    if sde_type not in KINDS:
        raise ValueError(f"sde_type: found {sde_type!r}, expected one of {', '.join(KINDS)}")
    result = step(KINDS[sde_type], self, model_output, timestep, sample, noise_level, prev_sample, generator)
    return result if return_sqrt_dt else result[:4]
