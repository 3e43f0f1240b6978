"""What the rewards of an iteration look like."""

from __future__ import annotations

from collections.abc import Mapping
from math import nan
from typing import Any

from torch import Tensor

from tempflow.credit.advantage import Credit, known_mean, known_std
from tempflow.rewards.panel import Panel


def reward_figures(rewards: Tensor, credit: Credit, panel: Panel, steps: Tensor, num_steps: int) -> Mapping[str, Any]:
    """The fields of an IterationRow that tell of rewards.

    Args:
        rewards: (V, M, S, R, K) of all processes.
        steps: (S, R) of their forks. num_steps: T.
    """
    by_scorer = rewards.transpose(0, 1)
    total = panel.total(by_scorer)
    return {
        "reward_mean": known_mean(total),
        "reward_means": {name: known_mean(row) for name, row in zip(panel.scorers, by_scorer, strict=True)},
        "reward_std_per_step": _spread(total, steps, num_steps),
        "rewards_missing": int(rewards.isnan().sum()),
        "groups_masked": credit.masked,
        "idle_share": round(credit.masked / credit.groups, 4),
    }


def _spread(total: Tensor, steps: Tensor, num_steps: int) -> list[float | None]:
    """Mean standard deviation among siblings of (V, S, R, K) rewards at each step but the last; None without a fork."""
    compared = (~total.isnan()).sum(3) > 1
    stds = known_std(total, (3,))[1].squeeze(3).where(compared, nan)
    at = steps.expand(stds.shape)
    return [known_mean(stds[at == step], 6) if (at == step).any() else None for step in range(num_steps - 1)]
