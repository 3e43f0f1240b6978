"""Results that are known already, from the results.csv of this study or of another beside it: no run is made twice.

So studies share runs, a study can be given more seeds where only its results were kept, and results that came with the
project can be drawn anew without a run.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tempflow.common.errors import BadInput
from tempflow.common.say import say
from tempflow.studies.compare.jobs import Job
from tempflow.studies.compare.resolved import Values, as_text, check_resolved, read_resolved, write_resolved
from tempflow.studies.compare.results import RESULTS, Point, write_csv
from tempflow.studies.compare.study import KEPT, Study

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
        BadInput: results in this folder cannot be read, or were made with other settings.
    """
    left = [job for job in jobs if not job.is_finished()]
    own = _own(jobs, left, folder)
    elsewhere = [_elsewhere(place) for place in sorted(folder.parent.glob("*")) if place != folder] if left else []
    found = {}
    for job in left:
        candidates = [own.get((job.run, job.seed)), *(place.get((job.settings, job.seed)) for place in elsewhere[::-1])]
        whole = (known for known in candidates if known and _complete(job, known, study.metric))
        if known := next(whole, None):
            found[job.run, job.seed] = _as(job, known)
    return found


def _own(jobs: Sequence[Job], left: Sequence[Job], folder: Path) -> dict[tuple[str, int], Known]:
    """(run, seed) -> results in this folder, whose runs have the settings that they were made with."""
    made_with = read_resolved(folder)
    for run, now in _settings(jobs).items():
        if run in made_with:
            check_resolved(run, now, made_with[run], folder)
    path = folder / RESULTS
    results = _by_run(path) if left and path.is_file() else {}
    for job in left:
        if (job.run, job.seed) in results and not (job.run in made_with or (job.folder / "config.yaml").is_file()):
            hint = f"nothing beside it says with what settings {job.run} was made; move it away to make all runs again"
            raise BadInput("study", path, hint)
    return results


def _settings(jobs: Sequence[Job]) -> dict[str, Values]:
    """Run -> what it is made with."""
    return {job.run: json.loads(job.settings) for job in jobs if job.settings}


def _elsewhere(place: Path) -> dict[tuple[str, int], Known]:
    """(settings, seed) -> results of another study's folder; none where it holds something else."""
    if not all((place / name).is_file() for name in (RESULTS, KEPT)):
        return {}
    try:
        made_with, results = read_resolved(place), _by_run(place / RESULTS)
    except BadInput as error:
        say(f"no results are taken from {place}: {error}")
        return {}
    told = {run: as_text(values) for run, values in made_with.items() if not isinstance(values, BadInput)}
    return {(told[run], seed): known for (run, seed), known in results.items() if run in told}


def _by_run(path: Path) -> dict[tuple[str, int], Known]:
    """(run, seed) -> results of a table."""
    points: dict[tuple[str, int], list[Point]] = {}
    for point in read_results(path):
        points.setdefault((point.run, point.seed), []).append(point)
    return {key: Known(path.parent.name, tuple(own)) for key, own in points.items()}


def _complete(job: Job, known: Known, metric: str) -> bool:
    """Whether a run has come to the very end that a job has, since its learning rate falls towards it, and was judged
    there by the metric."""
    last = known.points[-1]
    ended = last.seconds >= job.seconds if job.seconds else last.iteration == job.iterations
    return ended and metric in last.scores


def _as(job: Job, known: Known) -> Known:
    points = (Point(job.run, job.seed, p.iteration, p.network_rows, p.seconds, p.scores) for p in known.points)
    return Known(known.study, tuple(points))


def keep_results(points: Sequence[Point], jobs: Sequence[Job], folder: Path) -> None:
    """Writes results and the settings that they were made with; what was there and has not been made anew stays.

    Raises:
        BadInput: what is there cannot be read.
    """
    path, now = folder / RESULTS, {(point.run, point.seed) for point in points}
    before = {run: values for run, values in read_resolved(folder).items() if not isinstance(values, BadInput)}
    settings = _settings(jobs)
    own = {run: before.get(run, settings[run]) for run, _ in now if run in settings}
    left = path.is_file() and not all(job.is_finished() for job in jobs)
    stays = [point for point in read_results(path) if (point.run, point.seed) not in now] if left else []
    both = before | own
    write_resolved({run: both[run] for run in settings if run in both}, folder)
    write_csv([*points, *stays], path)


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
