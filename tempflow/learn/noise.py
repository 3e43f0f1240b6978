"""Where the loss takes the noise of the branches from: keys, which draw it twice, or one array of it.

The loss reads each noise in its forward pass and again in its gradient. Drawn from keys both times it takes no memory;
stored, it is drawn once a batch and read twice. The numbers are the same to the bit, so losses agree to the rounding of
their sums. Which is faster depends on the GPU; a CPU draws only once either way, so there `auto` takes keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from tempflow_kernels import branch_loss, normal_like
from torch import Tensor

from tempflow.common.capture import CaptureBroken
from tempflow.common.errors import BadInput
from tempflow.common.say import say
from tempflow.common.timing import device_seconds
from tempflow.learn.batches import TransitionBatch
from tempflow.parallel.ranks import Ranks

CALLS = 5
"""in one measured stretch: one call is shorter than the launch of its graph may take"""
FREE_SHARE = 0.1
"""of the free memory that stored noise may take"""


@dataclass(frozen=True)
class LossNoise:
    """Example: 4 rows of 6 siblings of (16, 64, 64): 6.0 MiB where stored."""

    stored: bool

    def of(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """The argument `key` (B, 2) or `noise` (B, K, D...) fp32 of `branch_loss`."""
        if not self.stored:
            return {"key": batch.keys}
        return {"noise": normal_like(batch.latents, batch.keys, batch.advantages.shape[1])}


@dataclass(frozen=True)
class Shape:
    """What a batch has: the arrays of the loss."""

    rows: int
    siblings: int
    latent: tuple[int, ...]
    reference: bool
    """there is a KL divergence to the model before training"""

    @property
    def stored_bytes(self) -> int:
        return 4 * self.rows * self.siblings * math.prod(self.latent)


def choose_noise(setting: str, shape: Shape, ranks: Ranks, free_bytes: float) -> LossNoise:
    """The way that `setting` (learn.noise) names, or on a GPU the faster one for `auto`; says which, and why.

    Args:
        free_bytes: memory that nothing else will need.
    Raises:
        BadInput: `stored`, and it does not fit.
    """
    here = shape.stored_bytes <= FREE_SHARE * free_bytes
    fits = bool(ranks.gather(torch.tensor([here]), 0).all())  # of all processes, so that all go the same way
    if setting == "stored" and not fits:
        hint = f"takes {_size(shape)} a batch, over a tenth of the free memory; use learn.noise=key"
        raise BadInput("learn.noise", setting, hint)
    if setting != "auto":
        return LossNoise(setting == "stored")
    if ranks.device.type == "cpu":
        return LossNoise(False)
    if not fits:
        say(f"loss noise: drawn twice from keys ({_size(shape)} a batch would not fit)")
        return LossNoise(False)
    return _faster(shape, ranks)


def _faster(shape: Shape, ranks: Ranks) -> LossNoise:
    """Of all processes together, so that all take the same way."""
    own = torch.tensor([[measure(shape, LossNoise(stored), ranks.device) for stored in (False, True)]])
    key, stored = (1e6 * ranks.gather(own, 0).mean(0)).tolist()
    if stored < key:
        words = f"stored, {_size(shape)}, {stored:.0f} us a batch (drawn twice from keys: {key:.0f} us)"
    else:
        words = f"drawn twice from keys, {key:.0f} us a batch (stored: {stored:.0f} us, {_size(shape)})"
    say(f"loss noise: {words}")
    return LossNoise(stored < key)


def measure(shape: Shape, noise: LossNoise, device: torch.device) -> float:
    """Seconds of a loss with its gradient, drawing included where the noise is stored; the least of several.

    Raises:
        BadInput: CUDA broke off its capture, so that this process cannot go on.
    """
    size = (shape.rows, *shape.latent)
    velocity = torch.zeros(size, device=device, requires_grad=True)
    old = torch.zeros(size, device=device)
    keys = torch.arange(2 * shape.rows, device=device).view(-1, 2)
    advantages = torch.ones(shape.rows, shape.siblings, device=device)
    terms = torch.ones(shape.rows, 4, device=device)

    def call() -> None:
        source = {"noise": normal_like(old, keys, shape.siblings)} if noise.stored else {"key": keys}
        loss, _ = branch_loss(velocity, old, advantages, terms, velocity_ref=old if shape.reference else None, **source)
        torch.autograd.grad(loss, velocity)

    def several() -> None:
        for _ in range(CALLS):
            call()

    try:
        return device_seconds(several, device) / CALLS
    except CaptureBroken as error:
        hint = f"CUDA broke off the capture of a loss ({error}), after which this process cannot go on; name key"
        raise BadInput("learn.noise", "auto", hint) from error
    except RuntimeError:  # it cannot be captured, or its graph does not fit: launches count
        return device_seconds(several, device, captured=False) / CALLS


def _size(shape: Shape) -> str:
    return f"{shape.stored_bytes / 2**20:.1f} MiB"
