"""Coefficients of the samplers whose functions this folder replaces, as tensors.

Notation: s = sigma, s' = next sigma, D = s - s' > 0; every step is `next = x_coef x + v_coef v + std noise`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def reverse_sde(sigma: Tensor, sigma_next: Tensor, diffusion: Tensor) -> Tensor:
    """(R, 3) coefficients of Euler-Maruyama for the reverse SDE with diffusion g(s).

    x_coef = 1 - g^2 D / (2 s), v_coef = -(1 + g^2 (1 - s) / (2 s)) D, std = g sqrt(D). Source: Flow-GRPO
    (arXiv 2505.05470) eq. 9; DanceGRPO (arXiv 2505.07818) with constant g.
    """
    step = sigma - sigma_next
    half = diffusion.square() / (2 * sigma)
    return torch.stack([1 - half * step, -(1 + half * (1 - sigma)) * step, diffusion * step.sqrt()], dim=1)


def flow_diffusion(sigma: Tensor, sigma_first: Tensor, noise_level: float) -> Tensor:
    """g(s) = level * sqrt(s / (1 - s)); at s = 1 the second sigma of the schedule stands in for s in the divisor."""
    return torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigma_first, sigma))) * noise_level


def coefficients_preserving(sigma: Tensor, sigma_next: Tensor, noise_level: float) -> Tensor:
    """(R, 3) coefficients of coefficients-preserving sampling (Flow-CPS, arXiv 2509.05952).

    With std = s' sin(level pi / 2) and q = sqrt(s'^2 - std^2): predicted data and noise are recombined with weights
    1 - s' and q, that is x_coef = 1 - s' + q, v_coef = q (1 - s) - s (1 - s').
    """
    std = sigma_next * math.sin(noise_level * math.pi / 2)
    kept = torch.sqrt(sigma_next.square() - std.square())
    return torch.stack([1 - sigma_next + kept, kept * (1 - sigma) - sigma * (1 - sigma_next), std], dim=1)
