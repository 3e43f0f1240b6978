"""One optimizer step: clip, guard, step, average, all queued on the device; the host reads the norms afterwards.

A step whose gradient norm is not finite changes no parameter and no moment. torch's fused AdamW decides that on the
device (its `found_inf`); bitsandbytes waits for the device after every parameter anyway, so there the host decides.

fp16: gradients below 6e-8 would vanish, and those of a mean over a latent are. So the loss is scaled, and gradients
back again in fp32: the scale halves whenever a gradient overflows and doubles after 200 steps without (as in
mixed-precision training, arXiv 1710.03740).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from tempflow.common.tensors import whole
from tempflow.learn.average import MovingAverage
from tempflow.learn.optimizers import state_bytes
from tempflow.learn.skips import Skips
from tempflow.parallel.ranks import Ranks

PATIENCE = 20
"""fp16: optimizer steps in a row that may be skipped; the loss scale has fallen to a millionth by then"""


class LossScale:
    """The factor on the loss in fp16, a number on the device."""

    START, LARGEST, INTERVAL = 2.0**16, 2.0**24, 200

    def __init__(self, device: torch.device):
        self.scale = torch.tensor(self.START, device=device)
        self.clean = torch.tensor(0.0, device=device)
        """steps without overflow since the last change"""

    def update(self, overflow: Tensor) -> None:
        """After a step; `overflow` is a bool () on the device."""
        self.clean = torch.where(overflow, 0.0, self.clean + 1)
        grown = self.clean >= self.INTERVAL
        factor = torch.where(overflow, 0.5, torch.where(grown, 2.0, 1.0))
        self.scale = (self.scale * factor).clamp(max=self.LARGEST)
        self.clean = torch.where(grown, 0.0, self.clean)

    def state(self) -> dict[str, float]:
        return {"scale": self.scale.item(), "clean": self.clean.item()}

    def load(self, state: Mapping[str, float]) -> None:
        self.scale.fill_(state["scale"])
        self.clean.fill_(state["clean"])


class Stepper:
    """What moves the parameters: all that a checkpoint has to hold.

    Args:
        scale: None where the network does not compute in fp16.
        skip_limit: steps in a row that may be skipped; in fp16 PATIENCE instead, as long as the scale needs to fall.
    """

    def __init__(
        self,
        parameters: dict[str, Parameter],
        optimizer: torch.optim.Optimizer,
        average: MovingAverage,
        max_norm: float,
        scale: LossScale | None = None,
        skip_limit: int = 3,
    ):
        self.parameters, self.optimizer, self.average = parameters, optimizer, average
        self.max_norm, self.scale = max_norm, scale
        self.norms: list[Tensor] = []
        self.idle_steps: set[int] = set()
        """places among `norms`"""
        self.skips = Skips(parameters, skip_limit if scale is None else PATIENCE, scale is not None)
        self.ranks: Ranks | None = None

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a loss to the parameters', times the loss scale where there is one."""
        (loss if self.scale is None else loss * self.scale.scale).backward()

    def idle(self) -> None:
        """An optimizer step in which nothing is to be learnt: no parameter moves, and its norm counts as 0."""
        self.idle_steps.add(len(self.norms))
        self.norms.append(torch.zeros((), device=next(iter(self.parameters.values())).device))

    def update(self, ranks: Ranks, idle: bool) -> None:
        """One optimizer step of all processes: gradients averaged over them, without waiting for the device.

        Args:
            idle: no process had anything to learn; then no parameter moves.
        """
        self.ranks = ranks
        if idle:
            self.idle()
            return
        ranks.average_gradients(self.parameters.values())
        if any(parameter.grad is not None for parameter in self.parameters.values()):
            self.step()
        else:  # groups tell something, but every weight here is 0
            self.idle()

    def step(self) -> None:
        """Clips the gradients, steps unless their norm is not finite, and drops them."""
        parameters = list(self.parameters.values())
        if self.scale is not None:
            inverse = 1 / self.scale.scale.to(parameters[0].device)
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], inverse)
        shared = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = whole(shared)
        overflow = ~torch.isfinite(norm)
        self.skips.blame(overflow)  # before all gradients are multiplied by what is no number
        torch.nn.utils.clip_grads_with_norm_(parameters, self.max_norm, shared)
        self._step_unless(overflow)
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update()
        if self.scale is not None:
            self.scale.update(overflow.to(self.scale.scale.device))
        self.norms.append(norm)

    def _step_unless(self, overflow: Tensor) -> None:
        if not getattr(self.optimizer, "_step_supports_amp_scaling", False):
            if not overflow.item():
                self.optimizer.step()
            return
        self.optimizer.found_inf = overflow.float()
        self.optimizer.step()
        del self.optimizer.found_inf

    def read(self) -> dict[str, Any]:
        """Figures of the steps since the last call, for which the host waits: the mean norm before clipping, bytes of
        the optimizer's state, how many steps were skipped, which the mean leaves out; the loss scale if there is one.

        Raises:
            Halted: more norms in a row are not finite than may be.
        """
        norms, idle = torch.stack(self.norms).tolist(), self.idle_steps
        self.norms, self.idle_steps = [], set()
        skipped = self.skips.count([None if n in idle else norm for n, norm in enumerate(norms)], self.ranks)
        finite = [norm for norm in norms if norm - norm == 0]
        figures: dict[str, Any] = {"grad_norm": sum(finite) / max(1, len(finite)), "skipped_steps": skipped}
        figures["optimizer_bytes"] = state_bytes(self.optimizer)
        return figures if self.scale is None else {**figures, "loss_scale": self.scale.scale.item()}
