"""How long a run will go on, evaluations included: a progress bar that counts iterations alone promises too much."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from tempflow.settings.fields import Config

RECENT = 20
"""iterations, or evaluations, whose mean the next ones are taken to last"""


@dataclass(frozen=True)
class Schedule:
    """When a run evaluates and ends."""

    iterations: int
    every: int
    """iterations between evaluations; 0: only after the last"""
    max_seconds: float | None
    """of training, evaluations apart"""

    @staticmethod
    def of(config: Config) -> Schedule:
        return Schedule(config.learn.iterations, config.eval.every, config.learn.max_seconds)

    def left(self, done: int, training: float, each: float) -> int:
        """Iterations that come yet, after `done` of them in `training` seconds, where one takes `each` seconds."""
        left = self.iterations - done
        if self.max_seconds is None or each <= 0:
            return max(left, 0)
        return max(min(left, math.ceil((self.max_seconds - training) / each)), 0)

    def evaluations(self, done: int, left: int) -> int:
        """Evaluations in the next `left` iterations; there is one after the last."""
        end = done + left
        regular = end // self.every - done // self.every if self.every else 0
        return regular + int(left > 0 and not (self.every and end % self.every == 0))


class Remaining:
    """Seconds that a run goes on for, from what its last iterations and evaluations took."""

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        self._iterations: deque[float] = deque(maxlen=RECENT)
        self._evaluations: deque[float] = deque(maxlen=RECENT)
        self._warm = False

    def resumed(self, done: int, evaluating: float) -> None:
        """An earlier process came to iteration `done` and spent so many seconds on evaluations."""
        regular = done // self.schedule.every if self.schedule.every else 0
        if regular:
            self.evaluated(evaluating / regular)

    def iterated(self, seconds: float) -> None:
        """An iteration took so long. The first of a process, which compiles and allocates, counts until the second."""
        if self._iterations and not self._warm:
            self._iterations.clear()
            self._warm = True
        self._iterations.append(seconds)

    def evaluated(self, seconds: float) -> None:
        """An evaluation took so long."""
        self._evaluations.append(seconds)

    def seconds(self, done: int, training: float) -> float | None:
        """After `done` iterations in `training` seconds; None before the first iteration of this process."""
        if not self._iterations:
            return None
        each = sum(self._iterations) / len(self._iterations)
        left = self.schedule.left(done, training, each)
        evaluation = sum(self._evaluations) / max(len(self._evaluations), 1)
        return left * each + self.schedule.evaluations(done, left) * evaluation
