"""Results that are known already, from the results.csv of this study or of another beside it: no run is made twice.

So studies share runs, a study can be given more seeds where only its results were kept, and results that came with the
project can be drawn anew without a run.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tempflow.common.errors import BadInput
from tempflow.studies.compare.jobs import Job
from tempflow.studies.compare.resolved import RESOLVED, as_text, read_resolved, resolved
from tempflow.studies.compare.results import RESULTS, Point
from tempflow.studies.compare.study import Study, configuration

PLAIN = ("run", "seed", "iteration", "network_rows", "seconds")


@dataclass(frozen=True)
class Known:
    """A run that another process made, and what it came to."""

    study: str
    """its folder's name"""
    points: tuple[Point, ...]
    """by iteration"""


def known_results(study: Study, jobs: Sequence[Job], folder: Path) -> dict[tuple[str, int], Known]:
    """(run, seed) -> its results, of the jobs that have not finished here but did elsewhere, with the same settings
    and to the same end, judged by the study's metric.

    Raises:
        BadInput: a results.csv or a settings.yaml in a folder beside this one cannot be read.
    """
    left = [job for job in jobs if not job.is_finished()]
    if not left:
        return {}
    found = {key: known for place in _places(folder) for key, known in _results(place).items()}
    named = {run: as_text(resolved(configuration(study, run))) for run in study.runs}
    pairs = ((job, found.get((named[job.run], job.seed))) for job in left)
    return {(job.run, job.seed): _as(job, known) for job, known in pairs
            if known and study.metric in known.points[-1].scores and _complete(job, known)}  # fmt: skip


def _places(folder: Path) -> Iterable[Path]:
    """Folders with results: this study's comes last, since it counts most."""
    others = (place for place in sorted(folder.parent.glob("*")) if place != folder)
    return (place for place in (*others, folder) if (place / RESULTS).is_file() and (place / RESOLVED).is_file())


def _results(place: Path) -> dict[tuple[str, int], Known]:
    """(settings, seed) -> results of a folder."""
    made_with, by_run = read_resolved(place / RESOLVED), {}
    for point in read_results(place / RESULTS):
        by_run.setdefault((point.run, point.seed), []).append(point)
    return {
        (as_text(values), seed): Known(place.name, tuple(points))
        for (run, seed), points in by_run.items()
        if (values := made_with.get(run)) is not None
    }


def _complete(job: Job, known: Known) -> bool:
    """Whether a run has come to the very end that a job has: its learning rate falls towards it."""
    last = known.points[-1]
    return last.seconds >= job.seconds if job.seconds else last.iteration == job.iterations


def _as(job: Job, known: Known) -> Known:
    points = (Point(job.run, job.seed, p.iteration, p.network_rows, p.seconds, p.scores) for p in known.points)
    return Known(known.study, tuple(points))


def read_results(path: Path) -> list[Point]:
    """What `write_csv` wrote.

    Raises:
        BadInput: the file holds something else.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [_point(row) for row in csv.DictReader(file, strict=True)]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise BadInput("study", path, f"is not what a study wrote ({error}); remove it, or its folder") from error


def _point(row: dict[str, str]) -> Point:
    scores = {name: float(value) for name, value in row.items() if name not in PLAIN and value != ""}
    whole = (int(row[name]) for name in ("seed", "iteration", "network_rows"))
    return Point(row["run"], *whole, float(row["seconds"]), scores)
