"""The runs of a study, one for each stack and seed: their commands, what they cost, how far they have come."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path

import torch

from tempflow.common.errors import BadInput
from tempflow.common.files import write_atomically
from tempflow.forecast.cost import network_rows
from tempflow.method import read_method
from tempflow.models.load import load_skeleton
from tempflow.records.rows import read_metrics
from tempflow.run.folder import check_same_run
from tempflow.settings.checks import check_consistency
from tempflow.settings.fields import Config
from tempflow.settings.reading import load
from tempflow.studies.compare.resolved import as_text, resolved
from tempflow.studies.compare.study import Study

ENDLESS = 10**6
"""iterations of a run whose budget is in seconds"""
FINISHED = "finished.json"


@dataclass(frozen=True)
class Job:
    """One run with one seed."""

    run: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]
    """of the training command, but for run.resume"""
    iterations: int
    """it will make at most"""
    rows: int
    """network rows that its training will take; 0 where the budget is in seconds"""
    seconds: float | None = None
    """of training that it will take, where the budget is in seconds"""
    known: bool = False
    """its results are known from elsewhere: it is not made again"""
    settings: str = ""
    """all that its results are a function of, as the files of its stack said when the study began"""

    @property
    def log(self) -> Path:
        """What the command says."""
        return self.folder.with_suffix(".log")

    def has_changed(self) -> bool:
        """Whether the files of its stack say something else by now.

        Raises:
            BadInput: they say nothing that can be read.
        """
        return bool(self.settings) and as_text(resolved(load(self.arguments))) != self.settings

    def is_finished(self) -> bool:
        return self.known or (self.folder / FINISHED).is_file()

    def finish(self) -> None:
        """Marks the run as finished."""
        write_atomically(self.folder / FINISHED, json.dumps({"command": self.command()}).encode())

    def command(self) -> list[str]:
        """Starts the run, or goes on with it where it was broken off."""
        resume = ["run.resume=true"] if (self.folder / "config.yaml").is_file() else []
        return [sys.executable, "-m", "tempflow", "train", *self.arguments, *resume]

    def done(self) -> float:
        """Part of the budget that is used up, from 0 to 1."""
        if self.is_finished():
            return 1.0
        rows = read_metrics(self.folder / "metrics.jsonl")
        last = rows[-1] if rows else {}
        spent, whole = ("training_seconds", self.seconds) if self.seconds else ("step", self.iterations)
        return min(1.0, last.get(spent, 0) / whole)


class Costs:
    """Network rows of iterations, by the model's configuration alone, which is read once for all runs alike."""

    def __init__(self) -> None:
        self.skeletons: dict[str, object] = {}

    def of_iteration(self, config: Config):
        """iteration -> network rows of it.

        Raises:
            BadInput: settings that cannot work together, or with this model.
        """
        check_consistency(config, 1)
        key = f"{config.model} {config.sample.height} {config.sample.width} {config.sample.guidance}"
        if key not in self.skeletons:
            self.skeletons[key] = load_skeleton(config.model, config.sample)
        skeleton = self.skeletons[key]
        method, schedule = read_method(config, skeleton.sigmas(config.sample.steps))
        return lambda iteration: network_rows(config, method, schedule, iteration, skeleton.network_rows)


def make_jobs(study: Study, folder: Path) -> list[Job]:
    """All runs of a study, seed by seed, so that times are those of neighbours.

    Raises:
        BadInput: settings that cannot work together, or a run in the folder that was made with other settings.
    """
    costs = Costs()
    jobs = [_job(study, folder, run, seed, costs) for seed in study.seeds for run in study.runs]
    for job in jobs:
        if (job.folder / "config.yaml").is_file():
            check_same_run(load([*job.arguments, "run.resume=true"]), job.folder)
    return jobs


def _job(study: Study, folder: Path, run: str, seed: int, costs: Costs) -> Job:
    place = folder / run / f"seed_{seed}"
    arguments = [*study.arguments(run), f"run.seed={seed}", f"run.dir={place}"]
    try:
        config = load(arguments)
        cost = costs.of_iteration(config)
    except BadInput as error:
        raise BadInput(f"runs.{run}", f"{error.field}={error.value}", error.hint) from error
    budget, rows = study.budget, 0
    if budget.seconds:
        own, iterations = [f"learn.max_seconds={budget.seconds}"], ENDLESS
    else:
        iterations, rows = _length(cost, budget.iterations, budget.rows)
        own = []
    arguments += [f"learn.iterations={iterations}", *own]
    return Job(run, seed, place, tuple(arguments), iterations, rows, budget.seconds,
               settings=as_text(resolved(config)))  # fmt: skip


def _length(cost, iterations: int | None, limit: int | None) -> tuple[int, int]:
    """Iterations, and their rows: as many as asked for, or until rows reach the limit."""
    rows = 0
    for iteration in count():
        rows += cost(iteration)
        if iteration + 1 == iterations or (limit is not None and rows >= limit):
            return iteration + 1, rows
    raise AssertionError("never here")


@dataclass(frozen=True)
class Machine:
    """Where runs go: GPUs, or cores."""

    gpus: tuple[str, ...]
    """their names in CUDA_VISIBLE_DEVICES; none on a CPU"""

    @staticmethod
    def found(device: str) -> Machine:
        """This machine, for runs with `run.device`."""
        if device == "cpu" or not torch.cuda.is_available():
            return Machine(())
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        return Machine(tuple(named.split(",")) if named else tuple(map(str, range(torch.cuda.device_count()))))

    @cached_property
    def places(self) -> int:
        """Runs that it takes at a time."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return len(self.gpus) or cores

    def environment(self, place: int) -> dict[str, str]:
        """Of the run at a place: a GPU of its own, or one thread."""
        own = {"CUDA_VISIBLE_DEVICES": self.gpus[place % len(self.gpus)]} if self.gpus else {"OMP_NUM_THREADS": "1"}
        return os.environ | own
