"""The formulas of the papers for one image, in float64: steps, tails, densities, advantages. Knows nothing of tempflow.

Notation: s is sigma now, s' the sigma stepped to, D = s - s', v = noise - data at x = (1 - s) data + s noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


def diffusion(kind: str, level: float, sigmas: list[float], step: int) -> float:
    """g of an SDE: Flow-GRPO's a sqrt(s / (1 - s)), DanceGRPO's eta, Flash-GRPO's sigma_1 s."""
    sigma = sigmas[step]
    if kind == "dance_sde":
        return level
    if kind == "flash_sde":
        return level * sigmas[1] * sigma
    return level * math.sqrt(sigma / (1 - (sigmas[1] if sigma == 1 else sigma)))


@dataclass(frozen=True)
class Move:
    """One stochastic step from `step` to `target`: its mean is a function of x and v."""

    kind: str
    level: float
    sigmas: tuple[float, ...]
    step: int
    target: int

    @property
    def size(self) -> float:
        return self.sigmas[self.step] - self.sigmas[self.target]

    @property
    def g(self) -> float:
        return diffusion(self.kind, self.level, list(self.sigmas), self.step)

    @property
    def std(self) -> float:
        if self.kind == "cps":
            return self.sigmas[self.target] * math.sin(self.level * math.pi / 2)
        return self.g * math.sqrt(self.size)

    def mean(self, x: Tensor, v: Tensor) -> Tensor:
        now, after = self.sigmas[self.step], self.sigmas[self.target]
        data, noise = x - now * v, x + (1 - now) * v
        if self.kind == "cps":
            return (1 - after) * data + math.sqrt(after**2 - self.std**2) * noise
        score = -noise / now  # of the marginal at s: -(x - (1 - s) data) / s^2
        return x - self.size * v + 0.5 * self.g**2 * self.size * score

    def sensitivity(self) -> float:
        """|d mean / d v| / std."""
        zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
        return abs(float(self.mean(zero, one))) / self.std


def log_density(following: Tensor, mean: Tensor, std: float) -> Tensor:
    """Mean over the elements of the Gaussian log-density."""
    return (-((following - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(2 * math.pi) / 2).mean()


def log_ratio(kind: str, following: Tensor, new: Tensor, old: Tensor, std: float) -> Tensor:
    """A difference of two log-probabilities, as the released codes form it."""
    if kind == "undivided":  # Flow-CPS
        return -((following - new) ** 2).mean() + ((following - old) ** 2).mean()
    difference = log_density(following, new, std) - log_density(following, old, std)
    if kind == "guard":  # GRPO-Guard: the mean of the log-ratio is taken away, what is left is scaled by std
        return std * (difference + ((new - old) ** 2).mean() / (2 * std**2))
    return difference


def visited(sigmas: tuple[float, ...], first: int, stride: int, drop_below: float) -> list[float]:
    """The sigmas of a tail, 0 at the end."""
    path = [sigmas[first]]
    for step in range(first + stride, len(sigmas) - 1, stride):
        if sigmas[step] >= drop_below:
            path.append(sigmas[step])
    return [*path, 0.0]


def follow(solver: str, path: list[float], x: Tensor, velocity) -> Tensor:
    """The ODE along `path`; velocity(x, sigma)."""
    past: list[tuple[float, Tensor, Tensor]] = []
    for now, after in pairwise(path):
        v = velocity(x, now)
        data = x - now * v
        if solver == "dpmpp_2m":
            following = _dpmpp(x, now, after, data, past)
        elif solver == "adams_2" and past:
            before, _, v_before = past[-1]
            slope = (v - v_before) / (now - before)
            following = x + (after - now) * v + slope * (after - now) ** 2 / 2
        else:
            following = x + (after - now) * v
        past.append((now, data, v))
        x = following
    return x


def _dpmpp(x: Tensor, now: float, after: float, data: Tensor, past: list) -> Tensor:
    """DPM-Solver++(2M) with alpha = 1 - sigma; of first order where a log-SNR is infinite."""
    if after == 0:
        return data
    if past and past[-1][0] < 1:
        before, data_before, _ = past[-1]
        step, step_before = _half_log_snr(after) - _half_log_snr(now), _half_log_snr(now) - _half_log_snr(before)
        r = step_before / step
        data = (1 + 1 / (2 * r)) * data - data_before / (2 * r)
    shrink = after / now  # sigma' / sigma; alpha' (exp(-h) - 1) = sigma' / sigma - 1
    return shrink * x + (1 - shrink) * data


def _half_log_snr(sigma: float) -> float:
    return math.log(1 - sigma) - math.log(sigma)


EPSILON = {"group": 1e-4, "global": 1e-4, "unbiased": 1e-8}
SMALLEST_SPREAD = 1e-6


def mean_and_std(values: list[float], unbiased: bool) -> tuple[float, float]:
    """Of the values that are not NaN."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return 0.0, 0.0
    mean = sum(known) / len(known)
    square = sum((value - mean) ** 2 for value in known)
    return mean, math.sqrt(square / max(1, len(known) - unbiased))


def differs(values: list[float]) -> bool:
    known = [value for value in values if not math.isnan(value)]
    return len(known) > 1 and max(known) - min(known) > SMALLEST_SPREAD


def advantage(reward: float, group: list[float], everyone: list[float], std: str) -> float:
    """Of one reward in its group; `everyone` are the rewards of all branches of its fork."""
    if math.isnan(reward) or not differs(group):
        return 0.0
    mean, spread = mean_and_std(group, unbiased=std == "unbiased")
    if std == "global":
        spread = mean_and_std(everyone, unbiased=False)[1]
    return (reward - mean) / (spread + EPSILON[std])


def clipped_loss(gain: float, log_ratio: Tensor, clip: float) -> Tensor:
    """max(-gain r, -gain clip(r, 1 - c, 1 + c)), gain = weight * advantage."""
    ratio = torch.exp(log_ratio)
    return torch.maximum(-gain * ratio, -gain * torch.clamp(ratio, 1 - clip, 1 + clip))
