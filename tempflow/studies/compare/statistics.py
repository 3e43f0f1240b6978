"""Means over seeds, their 95 % intervals by Student's t, and differences in pairs of one seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t as student


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
    count = len(values)
    half = float(student.ppf(0.975, count - 1)) * stdev(values) / math.sqrt(count) if count > 1 else math.nan
    return Interval(fmean(values), half, count)


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Interval | None:
    """The difference to a baseline, of the seeds that both have."""
    return interval([values[seed] - baseline[seed] for seed in values if seed in baseline])
