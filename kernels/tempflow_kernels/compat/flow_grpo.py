"""Drop-in for Flow-GRPO: `from tempflow_kernels.compat.flow_grpo import sde_step_with_logprob`.

Same signature, same returned tuple, same meaning of every argument as the function of that name in
yifan123/flow_grpo, `flow_grpo/diffusers_patch/sd3_sde_with_logprob.py` (kinds `sde` and `cps`).

What differs: without `prev_sample` the noise comes from one 64-bit key drawn from `generator` (on its device) per row
instead of from `torch.randn`, so a seeded run draws other, equally distributed noise; and with `prev_sample` the
sampler's log-density is computed by the fused operator. Gradients reach `model_output` through `log_prob` and
`prev_sample_mean`; a drawn `prev_sample` carries none, in the original it does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import transition_log_prob, transition_step
from .coefficients import coefficients_preserving, flow_diffusion, reverse_sde

LOG_SQRT_TWO_PI = 0.5 * math.log(2 * math.pi)


class Kind(NamedTuple):
    """One sampler: its tables, and what of the Gaussian log-density it reports."""

    coefficients: Callable
    """(sigma, next sigma, second sigma of the schedule, level) to coef (R, 3) and the std_dev_t that is returned."""
    unit_density: bool
    """Report -(next - mean)^2 only, as Flow-CPS does, instead of the log-density."""


def _sde(sigma: Tensor, sigma_next: Tensor, sigma_first: Tensor, noise_level: float) -> tuple[Tensor, Tensor]:
    diffusion = flow_diffusion(sigma, sigma_first, noise_level)
    return reverse_sde(sigma, sigma_next, diffusion), diffusion


def _cps(sigma: Tensor, sigma_next: Tensor, sigma_first: Tensor, noise_level: float) -> tuple[Tensor, Tensor]:
    coef = coefficients_preserving(sigma, sigma_next, noise_level)
    return coef, coef[:, 2]


KINDS = {"sde": Kind(_sde, unit_density=False), "cps": Kind(_cps, unit_density=True)}


def draw_keys(rows: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """(R, 2) noise keys: 62 random bits from the generator per row, offset 0."""
    source = device if generator is None else generator.device
    seed = torch.randint(0, 2**62, (rows,), dtype=torch.int64, device=source, generator=generator).to(device)
    return torch.stack([seed, torch.zeros_like(seed)], dim=1)


def mean_of(sample: Tensor, model_output: Tensor, coef: Tensor) -> Tensor:
    """The mean of the step (R, D...), differentiable in `model_output`."""
    x_coef, v_coef, _ = (column.view(-1, *[1] * (sample.dim() - 1)) for column in coef.unbind(1))
    return torch.addcmul(x_coef * sample, v_coef, model_output)


def draw(sample: Tensor, model_output: Tensor, coef: Tensor, generator: torch.Generator | None):
    """A next sample (R, D...) from fresh keys and its log-density (R,), both without gradient."""
    with torch.no_grad():
        key = draw_keys(sample.shape[0], sample.device, generator)
        prev_sample, log_prob = transition_step(sample, model_output, coef, key)
    return prev_sample.squeeze(1), log_prob.squeeze(1)


def log_density(prev_sample: Tensor, sample: Tensor, model_output: Tensor, coef: Tensor) -> Tensor:
    """(R,) mean log-density of prev_sample, differentiable in `model_output`; 0 where std = 0."""
    return transition_log_prob(prev_sample.detach().unsqueeze(1), sample, model_output, coef).squeeze(1)


def squared_error(prev_sample: Tensor, sample: Tensor, model_output: Tensor, coef: Tensor) -> Tensor:
    """(R,) -(prev_sample - mean)^2, mean over elements: the log-density at std = 1 without its constant, doubled."""
    unit = torch.stack([coef[:, 0], coef[:, 1], torch.ones_like(coef[:, 2])], dim=1)
    return 2 * (log_density(prev_sample, sample, model_output, unit) + LOG_SQRT_TWO_PI)


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
        model_output, sample: (R, D...), any float dtype; computed in fp32. timestep: R of the scheduler's timesteps.
        noise_level: a in [0, 1] or above for `sde`. prev_sample: (R, D...) to evaluate instead of drawing.
        generator: source of the noise keys. sde_type: `sde` (Flow-GRPO) or `cps` (Flow-CPS).
        return_sqrt_dt: append sqrt(sigma - next sigma) to the result.
    Returns:
        (prev_sample, log_prob (R,), prev_sample_mean, std_dev_t (R, 1...)[, sqrt_dt (R, 1...)]), all fp32.
    Raises:
        ValueError: an unknown `sde_type`, or tensors that do not fit.
    """
    if sde_type not in KINDS:
        raise ValueError(f"sde_type: found {sde_type!r}, expected one of {', '.join(KINDS)}")
    kind = KINDS[sde_type]
    model_output, sample = model_output.float(), sample.float()
    index = torch.tensor([self.index_for_timestep(t) for t in timestep])
    sigmas = self.sigmas.detach().double().cpu()
    sigma, sigma_next = sigmas[index], sigmas[index + 1]
    coef, std = kind.coefficients(sigma, sigma_next, sigmas[1], noise_level)
    coef, std, step = (table.float().to(sample.device) for table in (coef, std, sigma - sigma_next))
    mean = mean_of(sample, model_output, coef)
    if prev_sample is None:
        prev_sample, log_prob = draw(sample, model_output, coef, generator)
    else:
        prev_sample, log_prob = prev_sample.float(), None
    if log_prob is None or kind.unit_density or mean.requires_grad:  # else the draw has told it already
        density = squared_error if kind.unit_density else log_density
        log_prob = density(prev_sample, sample, model_output, coef)
    shape = (-1, *[1] * (sample.dim() - 1))
    result = prev_sample, log_prob, mean, std.view(shape)
    return (*result, step.sqrt().view(shape)) if return_sqrt_dt else result
