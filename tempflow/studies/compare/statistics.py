"""Means over seeds, their 95 % intervals by Student's t, and differences in pairs of one seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

T_QUANTILES = (
    12.70620, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600, 2.26216, 2.22814,
    2.20099, 2.17881, 2.16037, 2.14479, 2.13145, 2.11991, 2.10982, 2.10092, 2.09302, 2.08596,
)  # fmt: skip
"""The .975 quantiles of Student's t with 1 to 20 degrees of freedom."""
Z = 1.959963984540054


def t_quantile(freedom: int) -> float:
    """The .975 quantile of Student's t, to 1e-4: a table, and its expansion in 1 / freedom beyond."""
    if freedom <= len(T_QUANTILES):
        return T_QUANTILES[freedom - 1]
    first, second = (Z**3 + Z) / 4, (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    third = (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    return Z + first / freedom + second / freedom**2 + third / freedom**3


@dataclass(frozen=True)
class Interval:
    """A mean over seeds."""

    mean: float
    half: float
    """half the width of its 95 % interval; NaN for a single seed"""
    count: int

    def describe(self, form: str = ".3f", sign: str = "") -> str:
        width = "one seed" if math.isnan(self.half) else f"± {self.half:{form}}"
        return f"{self.mean:{sign}{form}} ({width})" if math.isnan(self.half) else f"{self.mean:{sign}{form}} {width}"


def interval(values: Sequence[float]) -> Interval | None:
    """Mean and interval of independent values; None of none."""
    if not values:
        return None
    half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Interval(fmean(values), half, len(values))


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Interval | None:
    """The difference to a baseline, of the seeds that both have."""
    return interval([values[seed] - baseline[seed] for seed in values if seed in baseline])
