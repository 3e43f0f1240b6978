"""`kernels benchmark` runs this: each operator against the same mathematics in eager torch, on the same noise."""

import math

import torch
from kernels.benchmark import Benchmark

ROWS, SIBLINGS, SHAPE = 4, 6, (16, 64, 64)
"""Latents of SD3.5 at 512 px, six branches a fork."""
CLIP = 0.2


class BranchBenchmark(Benchmark):
    """Step, log-ratio and loss of the branches of `ROWS` forks. `self.out` is what `verify_...` has to return."""

    seed = 0

    def setup(self):
        self.latents, self.velocity_old = (torch.randn(ROWS, *SHAPE, device=self.device) for _ in range(2))
        self.velocity = self.velocity_old + 0.01 * torch.randn_like(self.velocity_old)
        self.coef = torch.tensor([[0.98, -0.05, 0.3]], device=self.device).repeat(ROWS, 1)
        self.key = torch.tensor([[seed, 0] for seed in range(ROWS)], device=self.device)
        self.terms = self.kernel.gaussian_terms(self.coef)
        self.advantages = torch.randn(ROWS, SIBLINGS, device=self.device)
        self.noise = self.kernel.normal_like(self.latents, self.key, SIBLINGS)
        self.next_latents = self._mean(self.velocity_old) + self._scalar(2) * self.noise

    def _scalar(self, column):
        return self.coef[:, column, None, None, None, None]

    def _mean(self, velocity):
        return self._scalar(0) * self.latents[:, None] + self._scalar(1) * velocity[:, None]

    def _log_prob(self, next_latents, velocity):
        std = self._scalar(2)
        squares = ((next_latents - self._mean(velocity)) / std) ** 2
        return (-squares / 2 - std.log() - math.log(2 * math.pi) / 2).flatten(2).mean(2)

    def _eager_log_ratio(self):
        return self._log_prob(self.next_latents, self.velocity) - self._log_prob(self.next_latents, self.velocity_old)

    def benchmark_step(self):
        self.out, _ = self.kernel.transition_step(self.latents, self.velocity_old, self.coef, self.key, SIBLINGS)

    def verify_step(self):
        torch.randn_like(self.noise)  # what drawing costs; the values below need the kernel's own noise
        following = self._mean(self.velocity_old) + self._scalar(2) * self.noise
        self._log_prob(following, self.velocity_old)
        return following

    def benchmark_log_ratio(self):
        self.out = self.kernel.log_ratio(self.velocity, self.velocity_old, self.coef, self.key, SIBLINGS)

    def verify_log_ratio(self):
        return self._eager_log_ratio()

    def benchmark_loss(self):
        self.out, _ = self.kernel.branch_loss(
            self.velocity, self.velocity_old, self.advantages, self.terms, self.key, clip_range=(CLIP, CLIP)
        )

    def verify_loss(self):
        ratio, gain = self._eager_log_ratio().exp(), -self.advantages
        return torch.maximum(gain * ratio, gain * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
