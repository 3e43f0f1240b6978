"""Every random choice of a run as a pure function of who draws it.

A draw is identified by (run seed, iteration, prompt slot, noise index, step); siblings and elements are counters within
it (`tempflow_kernels.fold_key`). So a run depends neither on chunking nor on the number of ranks, and resume is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tempflow_kernels import fold_key, normal_like
from torch import Tensor

NOISE, FORKS, PROMPTS = range(3)
EVALUATION = 0xFFFFFFFF
"""The iteration number under which evaluation draws its fixed noises."""


def stream(run_seed: int, purpose: int) -> Tensor:
    """The 64-bit seed of one purpose (NOISE, FORKS, PROMPTS) of a run."""
    return fold_key(run_seed, purpose)


def shuffled(count: int, run_seed: int, purpose: int, turn: int) -> list[int]:
    """A permutation of range(count) as a pure function of its arguments: ranks of 64-bit random words."""
    words = fold_key(stream(run_seed, purpose), turn, torch.arange(count))
    return torch.argsort(words, stable=True).tolist()


@dataclass(frozen=True)
class Draw:
    """The identities of R rows of one iteration.

    Example: 2 prompts with 2 initial noises each on one rank: slots (0, 0, 1, 1), noises (0, 1, 0, 1).
    """

    run_seed: int
    iteration: int
    slots: Tensor
    """(R,) int64, index of the prompt among all prompts of the iteration, over all ranks"""
    noises: Tensor
    """(R,) int64, index of the initial noise of that prompt"""

    @staticmethod
    def grid(run_seed: int, iteration: int, slots: range, noises: int) -> Draw:
        """All (slot, noise) pairs, prompt by prompt: R = len(slots) * noises."""
        slot, noise = torch.meshgrid(torch.tensor(list(slots)), torch.arange(noises), indexing="ij")
        return Draw(run_seed, iteration, slot.flatten(), noise.flatten())

    def step_keys(self, steps: Tensor | int) -> Tensor:
        """(R, 2) int64 keys of the noise that siblings draw at a step, or each row at its own of (R,) steps."""
        return self._keys(steps + 1)

    def initial_noise(self, latent_shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
        """(R, *latent_shape) fp32 standard normal: where each trunk starts."""
        empty = torch.empty(len(self.slots), *latent_shape, device=device)
        return normal_like(empty, self._keys(0).to(device), 1)[:, 0]

    def _keys(self, moment: Tensor | int) -> Tensor:
        seed = fold_key(stream(self.run_seed, NOISE), self.iteration, self.slots, self.noises, moment)
        return torch.stack((seed, torch.zeros_like(seed)), dim=1)
