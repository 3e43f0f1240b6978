"""Drop-in for DanceGRPO: `from tempflow_kernels.compat.dance_grpo import flux_step`.

Same signature and returned tuples as the function of that name in XueZeyue/DanceGRPO,
`fastvideo/train_grpo_flux.py`, as it is since 2025-08-20: log_prob is the whole log-density. Copies from before have
its two constants, -log std and -log(2 pi) / 2, on a line of their own, where they have no effect; for these
`flux_step_without_constants`. The constants cancel in every ratio.

What differs: the noise comes from keys drawn from torch's default generator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .coefficients import reverse_sde
from .steps import LOG_SQRT_TWO_PI, draw, exact_signature, log_density, mean_of, to_rows


def _coefficients(sigma: Tensor, sigma_next: Tensor, eta: float, sde_solver: bool) -> Tensor:
    """(1, 3): the reverse SDE with constant diffusion, or the ODE's mean with the same std."""
    coef = reverse_sde(sigma, sigma_next, torch.full_like(sigma, eta))
    ode = torch.stack([torch.ones_like(sigma), sigma_next - sigma, coef[:, 2]], dim=1)
    return coef if sde_solver else ode


def _step(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver):
    """The result of `flux_step` and the coefficients (R, 3)."""
    sigma, sigma_next = sigmas[index : index + 2].detach().double().cpu().split(1)
    coef = to_rows(_coefficients(sigma, sigma_next, eta, sde_solver), latents)
    pred_original_sample = torch.sub(latents, model_output, alpha=float(sigma))
    if not grpo:
        return (mean_of(latents, model_output, coef), pred_original_sample), coef
    if prev_sample is None:
        prev_sample = draw(latents, model_output, coef, None)[0].squeeze(1)
    log_prob = log_density(prev_sample.unsqueeze(1), latents, model_output, coef)
    return (prev_sample, pred_original_sample, log_prob.squeeze(1)), coef


@exact_signature
def flux_step(
    model_output: torch.Tensor,
    latents: torch.Tensor,
    eta: float,
    sigmas: torch.Tensor,
    index: int,
    prev_sample: torch.Tensor | None,
    grpo: bool,
    sde_solver: bool,
):
    """One sampler step of DanceGRPO.

    Args:
        model_output, latents: (R, D...). eta: diffusion. sigmas: the schedule; index: the step.
        prev_sample: (R, D...) to evaluate, or None to draw. grpo: whether to draw and evaluate.
        sde_solver: whether the mean has the drift of the SDE.
    Returns:
        with `grpo`: (prev_sample, pred_original_sample, log_prob (R,)), log_prob being 0 where eta is 0; else
        (mean, pred_original_sample).
    Raises:
        ValueError: tensors that do not fit. TypeError: a keyword that the original does not have.
    """
    return _step(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver)[0]


@exact_signature
def flux_step_without_constants(
    model_output: torch.Tensor,
    latents: torch.Tensor,
    eta: float,
    sigmas: torch.Tensor,
    index: int,
    prev_sample: torch.Tensor | None,
    grpo: bool,
    sde_solver: bool,
):
    """`flux_step` as it was before 2025-08-20: log_prob = -(prev_sample - mean)^2 / (2 std^2), mean over elements."""
    result, coef = _step(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver)
    if not grpo:
        return result
    *others, log_prob = result
    std = coef[:, 2]
    constants = torch.where(std > 0, torch.log(torch.where(std > 0, std, 1.0)) + LOG_SQRT_TWO_PI, 0.0)
    return *others, log_prob + constants
