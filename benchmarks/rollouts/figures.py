"""From timed iterations to figures: rollouts per GPU-hour, network rows, utilisation, rank correlation of siblings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from machine.flops import ROW_COSTS, RowCost
from rollouts.bench import Bench, Case, Iteration
from torch import Tensor

from tempflow.explore.tails.solver import tail_solvers
from tempflow.forecast.cost import Shape, iteration_cost


@dataclass(frozen=True)
class NetworkRows:
    """Network rows of one iteration, guidance included."""

    trunk: int
    tails: int
    learn: int
    """rows that carry a gradient: one forward and one backward each"""
    reference: int
    """rows of the model before training: one forward each"""

    def flops(self, cost: RowCost, adapters: bool) -> float:
        forward = (self.trunk + self.tails + self.learn + self.reference) * cost.forward
        return forward + self.learn * cost.backward(adapters)


def network_rows(case: Case, measured: Iteration) -> NetworkRows:
    """Rows by phase; the released algorithm learns from K copies of every fork."""
    trainer, config, method = case.trainer, case.trainer.config, case.trainer.method
    shape = Shape(config.explore.prompts * method.noises, method.siblings, 1, 1, config.learn.inner_epochs)
    cost = iteration_cost(method.rule, trainer.schedule, tail_solvers(config.tails), shape)
    halves, copies = trainer.policy.network_rows, method.siblings if case.judge else 1
    learn = halves * cost.learn_rows * copies
    tails = cost.tail_rows if measured.tail_rows is None else measured.tail_rows
    return NetworkRows(halves * cost.trunk_rows, halves * tails, learn, learn if config.objective.kl else 0)


def row_cost(bench: Bench, case: Case) -> RowCost:
    """FLOPs of one network row of the case's transformer."""
    transformer = case.trainer.policy.pipeline.transformer
    return ROW_COSTS[type(transformer).__name__](transformer.config, *bench.row_tokens())


def figures(bench: Bench, case: Case, measured: Iteration, exact: Tensor | None) -> dict[str, Any]:
    """One row of results. `exact` are the (S, R, K) rewards of the same iteration by plain computation."""
    cost = row_cost(bench, case)
    rows, adapters = network_rows(case, measured), case.trainer.config.model.train == "lora"
    rollouts, total = case.rollouts, rows.flops(cost, adapters)
    row = {
        "seconds": round(measured.seconds, 4),
        "cpu_seconds": round(measured.cpu_seconds, 4),
        "rollouts": rollouts,
        "rollouts_per_hour": round(rollouts / measured.seconds * 3600, 1),
        "phase_seconds": measured.phases,
        "beside": beside(case),
        "rows": {"trunk": rows.trunk, "tails": rows.tails, "learn": rows.learn, "reference": rows.reference},
        "network_tflop": round(total / 1e12, 6),
        "tails_tflop": round(rows.tails * cost.forward / 1e12, 6),
        "working_gib": None if measured.gib is None else round(measured.gib, 3),
        "grad_norm": measured.grad_norm,
    }
    return row | ({} if exact is None else agreement(measured.rewards, exact))


def beside(case: Case) -> list[str]:
    """Phases whose seconds ran beside others; what they held up is the phase `wait`."""
    if case.judge:
        return ["reward"]
    return ["decode", "reward"] if case.trainer.scores.overlap else []


def agreement(rewards: Tensor, exact: Tensor) -> dict[str, float]:
    """How (S, R, K) rewards order siblings, against the exact ones.

    rank_correlation is Spearman's, within the K siblings of a fork, averaged over forks; that is what learning sees.
    """
    return {
        "rank_correlation": round(rank_correlation(rewards, exact), 4),
        "reward_error": float((rewards - exact).abs().mean()),
        "sibling_std": float(exact.std(2, correction=0).mean()),
    }


def rank_correlation(left: Tensor, right: Tensor) -> float:
    """Mean over the leading axes of Spearman's correlation along the last one; ties share their mean rank."""
    ranks = [mean_ranks(values.flatten(0, -2)) for values in (left, right)]
    centred = [rank - rank.mean(1, keepdim=True) for rank in ranks]
    norms = [rank.norm(dim=1) for rank in centred]
    defined = (norms[0] > 0) & (norms[1] > 0)
    products = (centred[0] * centred[1]).sum(1)[defined] / (norms[0] * norms[1])[defined]
    return products.mean().item() if len(products) else float("nan")


def mean_ranks(values: Tensor) -> Tensor:
    """Ranks within each row of (G, K) values; equal ones get the mean of their places."""
    below = (values[:, :, None] > values[:, None, :]).sum(2)
    equal = (values[:, :, None] == values[:, None, :]).sum(2)
    return below.double() + (equal.double() - 1) / 2
