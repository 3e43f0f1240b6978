"""Drop-in for DanceGRPO: `from tempflow_kernels.compat.dance_grpo import flux_step`.

Same signature and returned tuples as the function of that name in XueZeyue/DanceGRPO,
`fastvideo/train_grpo_flux.py`.

What differs: the noise comes from keys drawn from torch's default generator. Some versions of the original drop the
two constant terms of the log-density (they stand on a line of their own there), some keep them; this drops them. They
cancel in every ratio.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .coefficients import reverse_sde
from .flow_grpo import LOG_SQRT_TWO_PI, draw, log_density, mean_of


def _coefficients(sigma: Tensor, sigma_next: Tensor, eta: float, sde_solver: bool) -> Tensor:
    """(1, 3): the reverse SDE with constant diffusion, or the ODE's mean with the same std."""
    coef = reverse_sde(sigma, sigma_next, torch.full_like(sigma, eta))
    ode = torch.stack([torch.ones_like(sigma), sigma_next - sigma, coef[:, 2]], dim=1)
    return coef if sde_solver else ode


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
        with `grpo`: (prev_sample, pred_original_sample, log_prob (R,)); else (mean, pred_original_sample).
    Raises:
        ValueError: tensors that do not fit.
    """
    sigma, sigma_next = sigmas[index : index + 2].detach().double().cpu().split(1)
    coef = _coefficients(sigma, sigma_next, eta, sde_solver).float().to(latents.device).expand(latents.shape[0], 3)
    pred_original_sample = torch.sub(latents, model_output, alpha=float(sigma))
    if not grpo:
        return mean_of(latents, model_output, coef), pred_original_sample
    if prev_sample is None:
        prev_sample, _ = draw(latents, model_output, coef, None)
    log_prob = log_density(prev_sample, latents, model_output, coef)
    return prev_sample, pred_original_sample, log_prob + torch.log(coef[:, 2]) + LOG_SQRT_TWO_PI
