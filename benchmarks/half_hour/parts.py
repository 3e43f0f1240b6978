"""The parts of the first half hour on a GPU, as data, in the order of their worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from half_hour import verdicts
from half_hour.verdicts import Verdict

PROCESS = Path(__file__).with_name("measure.py")


@dataclass(frozen=True)
class Part:
    """One process and how its rows are judged."""

    name: str
    told: str
    limit: float
    """seconds; less where less is left of the whole"""
    judge: Callable[[list[dict]], list[Verdict]]
    program: tuple[str, ...] = (str(PROCESS),)
    """script and arguments, to which the name and the options are added"""
    resumes: bool = False
    """it reads its rows and goes on from there, rather than beginning anew"""


PARTS = (
    Part("numerics", "operators against float64, both kinds of noise, the words behind it", 300, verdicts.checks,
         resumes=True),
    Part("determinism", "repeats bit for bit", 60, verdicts.checks, resumes=True),
    Part("graph", "CUDA graphs replayed with other keys, coefficients, terms", 60, verdicts.checks, resumes=True),
    Part("tests", "pytest -m gpu", 240, verdicts.tests),
    Part("operators", "times in a graph beside predictions and the copy bandwidth", 240, verdicts.operators,
         resumes=True),
    Part("rollouts", "full iterations, the released algorithm against ours level by level", 590, verdicts.rollouts,
         resumes=True),
    Part("memory", "peak of a run of SD3.5-M with random weights against the plan", 300, verdicts.memory),
    Part("ratio", "the first log-ratio, which is 0 in exact arithmetic", 120, verdicts.ratio),
    Part("attention", "times of the attention backends at the shape of the run", 60, verdicts.attention),
    Part("sanitizer", "compute-sanitizer over every kernel, where it is installed", 110, verdicts.checks),
)  # fmt: skip
NAMES = [part.name for part in PARTS]
