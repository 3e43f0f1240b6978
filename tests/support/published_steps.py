"""Steps of published samplers in float64, row by row from the formulas of their papers, for the drop-in functions."""

import math

import torch
from torch.distributions import Normal

SIGMAS = torch.tensor([1.0, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.278, 0.0089, 0.0])
LEVEL = 0.7


class Scheduler:
    """What the functions ask of a diffusers scheduler."""

    sigmas = SIGMAS

    def index_for_timestep(self, timestep):
        return int((self.sigmas - float(timestep) / 1000).abs().argmin())


def timesteps(index):
    return SIGMAS[index] * 1000


def expected_step(kind, index, sample, velocity, level, following):
    """Per row (mean, std_dev_t, noise scale, log_prob) of Flow-GRPO's kinds `sde` and `cps`; index: one per row."""
    rows = []
    for i, x, v, nxt in zip(index, sample.double(), velocity.double(), following.double(), strict=True):
        s, s_next, s_first = (float(SIGMAS[k]) for k in (i, i + 1, 1))
        if kind == "sde":
            g = level * math.sqrt(s / (1 - (s_first if s == 1 else s)))
            score = -(x + (1 - s) * v) / s
            mean, std = x - (v - 0.5 * g**2 * score) * (s - s_next), g
            scale = g * math.sqrt(s - s_next)
            log_prob = Normal(mean, scale).log_prob(nxt).mean()
        else:
            std = scale = s_next * math.sin(level * math.pi / 2)
            data, noise = x - s * v, x + (1 - s) * v
            mean = (1 - s_next) * data + math.sqrt(s_next**2 - scale**2) * noise
            log_prob = -(nxt - mean).square().mean()
        rows.append((mean, std, scale, log_prob))
    return rows


def dance_step(x, v, following, eta, index, sde_solver):
    """DanceGRPO's (mean, predicted data, std, log_prob (R,)) in float64; `v` may be a leaf of autograd."""
    s, s_next = (SIGMAS[index + k].double() for k in (0, 1))
    data = x.double() - s * v
    mean = x.double() - (s - s_next) * v
    if sde_solver:
        score = -(x.double() - (1 - s) * data) / s**2
        mean = mean + 0.5 * eta**2 * score * (s - s_next)
    std = eta * torch.sqrt(s - s_next)
    return mean, data, std, Normal(mean, std).log_prob(following.double()).flatten(1).mean(1)
