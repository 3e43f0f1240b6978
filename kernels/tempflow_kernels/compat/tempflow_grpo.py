"""Drop-ins for TempFlow-GRPO's own code: `from tempflow_kernels.compat.tempflow_grpo import sde_step_with_logprob`.

Same signatures and returned tuples as the functions of the name `sde_step_with_logprob` in Shredded-Pork/TempFlow-GRPO:
* `sde_step_with_logprob`: flow_grpo/diffusers_patch/sd3_sde_with_logprob.py, with its `determistic` [sic];
* `sde_step_with_logprob_perstep`: ..._perstep.py, which draws 6 siblings of every row.

They return std * sqrt(dt) in the fourth place, where Flow-GRPO returns std. What differs from the originals: the noise,
as said in `flow_grpo`; everything is computed in fp32, as their scripts ask for with `.float()`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import expect
from .coefficients import flow_diffusion, reverse_sde
from .steps import (
    Generators,
    broadcast,
    checked_inputs,
    draw,
    exact_signature,
    log_density,
    mean_of,
    sigmas_of,
    to_rows,
)  # fmt: skip

NOISE_LEVEL = 0.7
"""The level, a number in the original's text: .7 for SD3.5-M; for FLUX it says .9, to be set here in its stead."""
SIBLINGS = 6
"""Branches of a row in the perstep function, a number in the original's text too."""


class _Step:
    """The tables of one call and its fp32 inputs."""

    def __init__(self, scheduler, model_output, timestep, sample, prev_sample, generator):
        both = prev_sample is not None and generator is not None
        expect(not both, "prev_sample, generator", "both", "at most one of the two")
        self.velocity, self.sample, self.given = checked_inputs(model_output, sample, prev_sample)
        sigmas = sigmas_of(scheduler, timestep, sample.shape[0])
        table = reverse_sde(sigmas.now, sigmas.following, flow_diffusion(sigmas.now, sigmas.second, NOISE_LEVEL))
        self.coef, self.std = to_rows(table, self.sample), broadcast(table[:, 2], self.sample)
        self.step = broadcast(sigmas.following - sigmas.now, self.sample)
        self.mean = mean_of(self.sample, self.velocity, self.coef)

    def drawn(self, generator: Generators, siblings: int) -> Tensor:
        """(R, K, D...)"""
        return draw(self.sample, self.velocity, self.coef, generator, siblings)[0]

    def result(self, following: Tensor, siblings: int = 1):
        """The tuple of the originals from next samples (R, K, D...): R x K rows, and the std of the noise."""
        log_prob = log_density(following, self.sample, self.velocity, self.coef)
        mean = self.mean.repeat_interleave(siblings, dim=0)
        return following.flatten(0, 1), log_prob.flatten(), mean, self.std

    def deterministic(self):
        """An Euler step of the ODE, and its density under the SDE."""
        return self.result((self.sample + self.step * self.velocity).unsqueeze(1))


@exact_signature
def sde_step_with_logprob(
    self,
    model_output: torch.FloatTensor,
    timestep: float | torch.FloatTensor,
    sample: torch.FloatTensor,
    prev_sample: torch.FloatTensor | None = None,
    generator: torch.Generator | None = None,
    determistic: bool = False,
):
    """One step of the Flow-GRPO SDE at level NOISE_LEVEL, or of the ODE, and its log-probability under the SDE.

    Args:
        self: a scheduler with `sigmas` and `index_for_timestep`. model_output, sample: (R, D...), any float dtype.
        timestep: one of the scheduler's timesteps for all rows, or R of them.
        prev_sample: (R, D...) to evaluate instead of drawing. generator: source of the noise keys, or a list of R.
        determistic: return the ODE's step, whatever `prev_sample` is.
    Returns:
        (prev_sample, log_prob (R,), prev_sample_mean, std * sqrt(dt)), all fp32; the last is (R, 1...), or (1, 1...)
        where one timestep was given.
    Raises:
        ValueError: both prev_sample and generator, or tensors, timesteps or generators that do not fit.
        TypeError: a keyword that the original does not have.
    """
    step = _Step(self, model_output, timestep, sample, prev_sample, generator)
    if determistic:
        return step.deterministic()
    return step.result(step.drawn(generator, 1) if step.given is None else step.given.unsqueeze(1))


@exact_signature
def sde_step_with_logprob_perstep(
    self,
    model_output: torch.FloatTensor,
    timestep: float | torch.FloatTensor,
    sample: torch.FloatTensor,
    prev_sample: torch.FloatTensor | None = None,
    generator: torch.Generator | None = None,
    determistic: bool = False,
):
    """The branching step: SIBLINGS next samples of every row, or one step of the ODE.

    Args:
        as in `sde_step_with_logprob`; prev_sample must be None (the original draws all the same).
    Returns:
        (prev_sample (R x 6, D...), log_prob (R x 6,), prev_sample_mean (R x 6, D...), std * sqrt(dt)), siblings of a
        row side by side; with `determistic` R rows. All fp32; the last is (R, 1...), or (1, 1...) of one timestep.
    Raises:
        ValueError: a prev_sample, or tensors, timesteps or generators that do not fit.
        TypeError: a keyword that the original does not have.
    """
    expect(prev_sample is None, "prev_sample", "a value", "None: this function draws, it does not evaluate")
    step = _Step(self, model_output, timestep, sample, None, generator)
    if determistic:
        return step.deterministic()
    return step.result(step.drawn(generator, SIBLINGS), SIBLINGS)
