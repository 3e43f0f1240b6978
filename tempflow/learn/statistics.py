"""What the losses of an iteration saw."""

from __future__ import annotations

import torch
from tempflow_kernels import BranchLossStats
from torch import Tensor

MAXIMA = ("log_ratio_max", "ratio_max")


class LossRecord:
    """Statistics of the batches of one iteration, kept on the device until they are asked for."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []
        self.updates: list[int] = []
        self.weights: list[float] = []

    def add(self, stats: BranchLossStats, update: int, weight: float = 1.0) -> None:
        """One batch of the optimizer step number `update` of this iteration, with its weight in the means."""
        self.batches.append(stats.table.float())
        self.updates.append(update)
        self.weights.append(weight)

    def totals(self) -> Tensor:
        """(1, 2, 2 + figures): the batches' weight, each figure's weighted sum (maximum for *_max), and how many
        batches are left out of these since a figure is not finite; over all updates and over the first alone."""
        width = len(BranchLossStats._fields)
        table = torch.stack(self.batches).cpu() if self.batches else torch.zeros(0, width)
        first = torch.tensor(self.updates, dtype=torch.int64) == 0
        weights = torch.tensor(self.weights)
        return torch.stack((_total(table, weights), _total(table[first], weights[first]))).unsqueeze(0)


def _total(table: Tensor, weights: Tensor) -> Tensor:
    known = table.isfinite().all(1)
    columns, weights = table[known].unbind(1), weights[known]
    maxima = [name in MAXIMA for name in BranchLossStats._fields]
    values = [(column.max() if top else (weights * column).sum()) if len(column) else torch.tensor(0.0)
              for column, top in zip(columns, maxima, strict=True)]  # fmt: skip
    return torch.stack([weights.sum(), *values, (~known).sum()])


def loss_figures(totals: Tensor) -> dict[str, float]:
    """Means (maxima for *_max) over the batches of all ranks, from their totals (ranks, 2, 2 + figures).

    first_log_ratio_* are those of the first update, where the policy has not moved yet: anything but 0 there is
    numerical drift between sampling and learning. Nothing where no rank had a batch.
    """
    everything, first = (_average(part) for part in totals.unbind(1))
    drift = {f"first_{name}": first[name] for name in ("log_ratio_mean", "log_ratio_max") if first}
    lost = int(totals[:, 0, -1].sum())
    return everything | drift | ({"nonfinite_losses": lost} if lost else {})


def _average(totals: Tensor) -> dict[str, float]:
    count = totals[:, 0].sum()
    if not count:
        return {}
    columns = zip(BranchLossStats._fields, totals[:, 1:-1].unbind(1), strict=True)
    return {name: (column.max() if name in MAXIMA else column.sum() / count).item() for name, column in columns}
