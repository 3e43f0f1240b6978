"""A study from its file to its report."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tempflow.common.errors import BadInput
from tempflow.common.files import write_atomically
from tempflow.common.say import say
from tempflow.records.rows import read_metrics
from tempflow.studies.compare.figures import draw_curves, draw_differences
from tempflow.studies.compare.jobs import Job, Machine, make_jobs
from tempflow.studies.compare.known import Known, keep_results, known_results
from tempflow.studies.compare.page import contrasts_table, kinds_table, results_table, write_page
from tempflow.studies.compare.pool import Failure, run_jobs
from tempflow.studies.compare.results import Contrast, by_kind, contrast, read_points, summarise
from tempflow.studies.compare.study import Study, configuration, open_folder

TRIAL = ("prompts.test=null", "learn.iterations=3", "eval.every=0", "run.save_every=0")
"""A run that only tells how fast iterations are; its last two are timed."""


def make_study(study: Study, folder: Path, processes: int | None = None) -> int:
    """Makes all runs that are not finished, and the report; returns the exit code, 1 where a run failed.

    Raises:
        BadInput: anything that the user has to change, before a run begins.
    """
    (jobs, known), machine = _jobs(study, folder), _machine(study)
    open_folder(study, folder)
    failures: list[Failure] = []
    try:
        failures += run_jobs(jobs, machine, _places(study, machine, processes))
    finally:
        print(write_report(study, folder, jobs, failures, known))
    return 1 if failures else 0


def _jobs(study: Study, folder: Path) -> tuple[list[Job], dict[tuple[str, int], Known]]:
    """All runs, and the results of those that need not be made again."""
    jobs = make_jobs(study, folder)
    known = known_results(study, jobs, folder)
    return [replace(job, known=(job.run, job.seed) in known) for job in jobs], known


def write_report(study: Study, folder: Path, jobs: Sequence[Job], failures: Sequence[Failure],
                 known: Mapping[tuple[str, int], Known] | None = None) -> str:  # fmt: skip
    """results.csv, settings.yaml, study.png and study.html; returns the results in words."""
    known = known or {}
    points = read_points(jobs, {key: result.points for key, result in known.items()})
    summaries = summarise(points, jobs, study.metric, study.target, study.baseline)
    notes = [failure.describe() for failure in failures]
    if others := sorted({result.study for result in known.values()} - {folder.name}):
        notes.append(f"{sum(result.study != folder.name for result in known.values())} runs are those of the same "
                     f"settings in {', '.join(others)}; their seconds were measured there")  # fmt: skip
    if points and not any(study.metric in point.scores for point in points):
        notes.append(f"metric={study.metric}: no run has this score; there are {', '.join(points[-1].scores)}")
    keep_results(points, jobs, folder)
    write_atomically(folder / "study.png", draw_curves(study, points))
    contrasts = contrast(points, jobs, study.metric, study.contrasts)
    against = [Contrast(summary.run, study.baseline, summary.difference)
               for summary in summaries if study.baseline not in (None, summary.run)]  # fmt: skip
    pictures = [draw_curves(study, points, "svg"), draw_differences(study, [*against, *contrasts], "svg")]
    tables = [results_table(study, summaries), kinds_table(study, by_kind(points, jobs, study.metric)),
              contrasts_table(study, contrasts)]  # fmt: skip
    page = write_page(study, tables, jobs, notes, [picture for picture in pictures if picture])
    write_atomically(folder / "study.html", page.encode())
    words = [line for table in tables for line in table.lines()]
    return "\n".join([*words, *notes, f"report: {folder / 'study.html'}"])


def describe(study: Study, folder: Path, processes: int | None = None) -> str:
    """What a study would run, what that costs, and how long it will take. Changes nothing in the folder."""
    (jobs, _), machine = _jobs(study, folder), _machine(study)
    places, lines = _places(study, machine, processes), []
    for run in study.runs:
        own = [job for job in jobs if job.run == run]
        cost = f"{own[0].iterations:,} iterations, {own[0].rows:,} network rows a seed; " if own[0].rows else ""
        done = sum(job.is_finished() for job in own)
        lines.append(f"{run}: {len(own)} seeds, {done} finished; {cost}{' '.join(study.arguments(run))}")
    left = [job for job in jobs if not job.is_finished()]
    rows, words = sum(job.rows * (1 - job.done()) for job in left), f"{len(left)} of {len(jobs)} runs left"
    if not left:
        return "\n".join([*lines, words])
    seconds = sum((study.budget.seconds or 0) * (1 - job.done()) for job in left) or rows / _speed(jobs, machine)
    per_run = f", {rows:,.0f} network rows" if rows else ""
    lines.append(f"{words}{per_run}; {places} at a time: about {seconds / places / 60:,.1f} minutes, and evaluations")
    return "\n".join(lines)


def _machine(study: Study) -> Machine:
    return Machine.found(configuration(study, next(iter(study.runs))).run.device)


def _places(study: Study, machine: Machine, processes: int | None) -> int:
    """Runs at a time."""
    return processes or (machine.places if study.processes == "auto" else study.processes)


def _speed(jobs: Sequence[Job], machine: Machine) -> float:
    """Network rows a second of one process: of runs in the folder, or else of two iterations made here."""
    lasts = [rows[-1] for job in jobs if (rows := read_metrics(job.folder / "metrics.jsonl")) and rows[-1]["step"]]
    if lasts:
        return sum(row["network_rows"] for row in lasts) / sum(row["training_seconds"] for row in lasts)
    say("nothing has been timed yet: three iterations of the first run tell how fast they are")
    with tempfile.TemporaryDirectory() as folder:
        first = jobs[0]
        place = Path(folder) / "trial"
        arguments = (*first.arguments, *TRIAL, f"run.dir={place}")
        trial = replace(first, folder=place, iterations=3, known=False, arguments=arguments, settings="")
        failures = run_jobs([trial], machine, 1)
        if failures:
            raise BadInput(f"runs.{first.run}", f"seed {first.seed}", f"fails: {failures[0].line}")
        rows = {row["step"]: row for row in read_metrics(place / "metrics.jsonl")}
    done, seconds = (rows[3][name] - rows[1][name] for name in ("network_rows", "training_seconds"))
    return done / seconds
