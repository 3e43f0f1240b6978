"""What the runs of a study came to: a row per evaluation, a curve per run and seed, a summary per run."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tempflow.common.files import write_atomically
from tempflow.records.rows import read_metrics
from tempflow.studies.compare.jobs import Job
from tempflow.studies.compare.statistics import Interval, interval, paired

AXES = {"iteration": "iterations", "network_rows": "network rows", "seconds": "seconds of training"}
"""What curves are drawn against, and how it is called."""
RESULTS = "results.csv"


@dataclass(frozen=True)
class Point:
    """One evaluation of one run."""

    run: str
    seed: int
    iteration: int
    network_rows: int
    seconds: float
    """of training, without evaluations"""
    scores: dict[str, float]
    """held-out scores, `gold/KIND` those of one kind of prompt; `reward` is of training, the mean over the branches of
    that iteration"""


def read_points(jobs: Sequence[Job], known: Mapping[tuple[str, int], Sequence[Point]] | None = None) -> list[Point]:
    """All evaluations of all runs that have begun.

    Args:
        known: (run, seed) -> those of runs that were made elsewhere.
    """
    known = known or {}
    return [point for job in jobs for point in known.get((job.run, job.seed)) or _points(job)]


def _points(job: Job) -> list[Point]:
    found = []
    for row in read_metrics(job.folder / "metrics.jsonl"):
        held_out = (name for name in row if name.startswith(("gold", "reward_test")) and name != "gold_fall")
        told = {name: row[name] for name in held_out} | row.get("kinds", {})
        scores = {name: value for name, value in told.items() if value is not None and math.isfinite(value)}
        if scores:
            trained = {"reward": row["reward_mean"]} if row.get("reward_mean") is not None else {}
            found.append(Point(job.run, job.seed, row["step"], row.get("network_rows", 0),
                               row.get("training_seconds", 0.0), trained | scores))  # fmt: skip
    return found


def write_csv(points: Sequence[Point], path: Path) -> None:
    """A row per run, seed and evaluation."""
    names = list(dict.fromkeys(name for point in reversed(points) for name in point.scores))
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(["run", "seed", "iteration", "network_rows", "seconds", *names])
    for point in points:
        head = [point.run, point.seed, point.iteration, point.network_rows, point.seconds]
        table.writerow([*head, *(point.scores.get(name, "") for name in names)])
    write_atomically(path, buffer.getvalue().encode())


@dataclass(frozen=True)
class Curve:
    """A score of a run over its seeds."""

    x: list[float]
    mean: list[float]
    half: list[float]
    """NaN for a single seed"""


def curve(points: Sequence[Point], run: str, axis: str, score: str) -> Curve:
    """The mean over seeds, at the mean place of each evaluation that all of them have; between evaluations of a seed
    its score is interpolated."""
    by_seed: dict[int, list[tuple[float, float]]] = {}
    for point in points:
        if point.run == run and score in point.scores:
            by_seed.setdefault(point.seed, []).append((getattr(point, axis), point.scores[score]))
    if not by_seed:
        return Curve([], [], [])
    shared = min(map(len, by_seed.values()))
    end = min(pairs[-1][0] for pairs in by_seed.values())
    grid = np.minimum(np.mean([[x for x, _ in pairs[:shared]] for pairs in by_seed.values()], 0), end)
    values = [np.interp(grid, *np.array(pairs).T) for pairs in by_seed.values()]
    means = [interval([float(row[place]) for row in values]) for place in range(len(grid))]
    return Curve(grid.tolist(), [m.mean for m in means], [m.half for m in means])


@dataclass(frozen=True)
class Summary:
    """One run over its finished seeds."""

    run: str
    seeds: list[int]
    final: Interval | None
    """the metric at the last evaluation"""
    difference: Interval | None
    """to the baseline, in pairs of one seed; None of the baseline itself"""
    reached: int
    """seeds that came to the target"""
    rows: Interval | None
    """network rows to the target, of the seeds that reached it"""
    seconds: Interval | None

    def at_target(self, value: Interval | None, target: float | None) -> str:
        """Rows or seconds to the target in words: what was not reached is said."""
        if target is None or not self.seeds:
            return ""
        if value is None:
            return f"never reached ({len(self.seeds)} seeds)"
        few = f"; reached by {self.reached} of {len(self.seeds)} seeds only" if self.reached < len(self.seeds) else ""
        return value.describe(",.0f") + few


@dataclass(frozen=True)
class Contrast:
    """How one run ends against another, in pairs of one seed."""

    run: str
    other: str
    difference: Interval | None
    """None where no seed has finished in both"""

    def describe(self) -> str:
        return self.difference.describe(sign="+") if self.difference else "no seed has finished in both"


def contrast(points: Sequence[Point], jobs: Sequence[Job], metric: str,
             pairs: Sequence[tuple[str, str]]) -> list[Contrast]:  # fmt: skip
    """The differences of `pairs`, each (run, other)."""
    finals = _finals(_finished(points, jobs), jobs, metric)
    return [Contrast(run, other, paired(finals[run], finals[other])) for run, other in pairs]


def _finished(points: Sequence[Point], jobs: Sequence[Job]) -> list[Point]:
    """Held-out evaluations of finished runs."""
    finished = {(job.run, job.seed) for job in jobs if job.is_finished()}
    return [point for point in points if (point.run, point.seed) in finished]


def _finals(points: Sequence[Point], jobs: Sequence[Job], metric: str) -> dict[str, dict[int, float]]:
    """Run -> seed -> its score at the last evaluation, if that has one."""
    lasts = {(point.run, point.seed): point for point in points}
    finals: dict[str, dict[int, float]] = {job.run: {} for job in jobs}
    for (run, seed), point in lasts.items():
        if metric in point.scores:
            finals[run][seed] = point.scores[metric]
    return finals


def by_kind(points: Sequence[Point], jobs: Sequence[Job], metric: str) -> dict[str, dict[str, Interval]]:
    """Kind of prompt -> run -> the metric at the last evaluation, of those prompts alone; of finished runs."""
    known = _finished(points, jobs)
    names = dict.fromkeys(name for point in known for name in point.scores if name.partition("/")[0] == metric != name)
    found = {name.partition("/")[2]: _finals(known, jobs, name) for name in names}
    return {kind: {run: mean for run, values in finals.items() if (mean := interval(list(values.values())))}
            for kind, finals in found.items()}  # fmt: skip


def summarise(points: Sequence[Point], jobs: Sequence[Job], metric: str, target: float | None,
              baseline: str | None) -> list[Summary]:  # fmt: skip
    """A summary of each run, of finished runs alone."""
    known = _finished(points, jobs)
    finals = _finals(known, jobs, metric)
    hits: dict[str, dict[int, Point]] = {job.run: {} for job in jobs}
    for point in known:
        if target is not None and point.scores.get(metric, -math.inf) >= target:
            hits[point.run].setdefault(point.seed, point)
    found = []
    for run, values in finals.items():
        reached = list(hits[run].values())
        difference = paired(values, finals[baseline]) if baseline and run != baseline else None
        found.append(Summary(run, list(values), interval(list(values.values())), difference, len(reached),
                             interval([float(p.network_rows) for p in reached]),
                             interval([p.seconds for p in reached])))  # fmt: skip
    return found
