"""Optimizer steps that were skipped, since a gradient was not finite: how many in a row, and whose gradients they were.

Decided from figures that all processes share, so that all of them stop at the same step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from tempflow.common.errors import Halted
from tempflow.common.tensors import own_share
from tempflow.parallel.ranks import Ranks

SHOWN = 3
"""Tensors that a message names."""


class Skips:
    """Example: limit 3: the third skipped step in a row ends the run; idle steps in between do not count.

    Args:
        scaled: the loss is scaled (fp16), so that some steps are skipped until the scale fits.
    """

    def __init__(self, parameters: Mapping[str, Parameter], limit: int, scaled: bool):
        self.parameters, self.limit, self.scaled = parameters, limit, scaled
        self.in_a_row = 0
        device = own_share(next(iter(parameters.values()))).device
        self.blamed = torch.zeros(len(parameters), dtype=torch.bool, device=device)
        """whose gradients were not finite in the last skipped step, in this process"""

    @torch.no_grad()
    def blame(self, overflow: Tensor) -> None:
        """Keeps, on the device, whose gradients are not finite, where `overflow`, bool (), says that a step is lost."""
        gradients = [own_share(p.grad) for p in self.parameters.values() if p.grad is not None]
        norms = iter(torch._foreach_norm(gradients) if gradients else ())
        none = torch.zeros((), device=self.blamed.device)
        found = [next(norms) if p.grad is not None else none for p in self.parameters.values()]
        self.blamed = torch.where(overflow.to(none.device), ~torch.stack(found).isfinite(), self.blamed)

    def count(self, norms: Sequence[float | None], ranks: Ranks | None) -> int:
        """How many of the steps with these norms were skipped; None stands for an idle step.

        Raises:
            Halted: `limit` in a row were, with the tensors to blame.
        """
        skipped = 0
        for norm in (norm for norm in norms if norm is not None):
            lost = norm - norm != 0
            skipped, self.in_a_row = skipped + lost, self.in_a_row + 1 if lost else 0
            if self.in_a_row >= self.limit:
                raise self._halted(ranks)
        return skipped

    def _halted(self, ranks: Ranks | None) -> Halted:
        blamed = self.blamed[None].int() if ranks is None else ranks.gather(self.blamed[None].int(), 0)
        names = [name for name, bad in zip(self.parameters, blamed.amax(0).tolist(), strict=True) if bad]
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        found = f"{', '.join(names[:SHOWN]) or 'their norm alone'}{more}"
        self.in_a_row = 0
        if self.scaled:
            hint = f"{self.limit} gradients in a row were not finite ({found}), and a smaller loss scale did not help"
            return Halted("model.dtype", "fp16", f"{hint}; use bf16")
        hint = f"so many gradients in a row were not finite ({found}), and their steps were not taken"
        return Halted("learn.skip_limit", self.limit, f"{hint}; lower learn.lr and go on with run.resume=true")
