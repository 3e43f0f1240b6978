"""Runs train_step and the oracle side by side and compares everything that they compute on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from oracle import Branch, Facts, Oracle
from torch import Tensor
from toy_trainer import FIRST, REFERENCE, SHAPE, Judge, Record, make_trainer, panel_of, parameters_of, velocity_of_one

import tempflow.train
from tempflow.records.rows import IterationRow
from tempflow.run.trainer import Trainer
from tempflow.settings.fields import Config

GRADIENT, PARAMETER, IMAGE, ADVANTAGE = 1e-5, 2e-6, 2e-6, 1e-5
"""Tolerances of the fp32 trainer against the float64 oracle: gradients relative to their norm, the others absolute."""


@dataclass
class Errors:
    """The largest differences seen."""

    image: float = 0.0
    reward: float = 0.0
    advantage: float = 0.0
    gradient: float = 0.0
    parameter: float = 0.0
    average: float = 0.0
    clipped: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """branches with a gain whose ratio was outside, below and above"""

    def check(self) -> None:
        assert self.image < IMAGE, self
        assert self.reward < 10 * IMAGE, self
        assert self.advantage < ADVANTAGE, self
        assert self.gradient < GRADIENT, self
        assert max(self.parameter, self.average) < PARAMETER, self


@contextmanager
def watched_credit() -> Iterator[list]:
    """(rewards, credit) of every train_step within."""
    seen, real = [], tempflow.train.give_credit

    def watch(rewards: Tensor, *arguments):
        credit = real(rewards, *arguments)
        seen.append((rewards, credit))
        return credit

    tempflow.train.give_credit = watch
    try:
        yield seen
    finally:
        tempflow.train.give_credit = real


@dataclass
class Pair:
    """A trainer and its oracle, from the same parameters."""

    facts: Facts
    trainer: Trainer
    record: Record
    oracle: Oracle
    judges: Sequence[Judge]
    weights: Sequence[float]
    errors: Errors = field(default_factory=Errors)
    rows: list[IterationRow] = field(default_factory=list)
    last: list[Branch] = field(default_factory=list)
    """the oracle's trajectories of the last iteration"""

    def run(self, iterations: int) -> Errors:
        for iteration in range(iterations):
            self.iterate(iteration)
        return self.errors

    def iterate(self, iteration: int) -> None:
        self.record.images.clear()
        self.record.gradients.clear()
        with watched_credit() as seen:
            self.rows.append(tempflow.train.train_step(self.trainer, iteration))
        forks = self._forks(iteration)
        texts = [prompt.text for prompt in self.trainer.feed.at(iteration)[0]]
        branches = self.oracle.sample(iteration, texts, forks, torch.Size(SHAPE))
        self.oracle.judge(branches, self.judges, self.weights)
        self.last = branches
        self._compare_images(branches)
        self._compare_credit(branches, *seen[0])
        self._compare_learning(self.oracle.learn(iteration, branches))

    def _forks(self, iteration: int) -> list[list[int]]:
        """Given: where the trunks of each prompt fork."""
        steps = self.trainer.method.plan(self.facts.run_seed, iteration, self.trainer.config.explore.prompts).steps
        return steps.T.tolist()

    def _axes(self, branches: list[Branch]) -> tuple[int, int, int, int]:
        forks = 1 + max(branch.fork for branch in branches)
        trunks = (1 + max(branch.prompt for branch in branches)) * self.facts.noises
        return len(self.facts.strides), forks, trunks, self.facts.siblings

    def place(self, branch: Branch) -> tuple[int, int, int]:
        return branch.fork, branch.prompt * self.facts.noises + branch.noise, branch.sibling

    def _compare_images(self, branches: list[Branch]) -> None:
        found = self.record.finished().view(*self._axes(branches), *SHAPE)
        for branch in branches:
            for tail, image in enumerate(branch.images):
                self._grow("image", (found[(tail, *self.place(branch))] - image).abs().max())

    def _compare_credit(self, branches: list[Branch], rewards: Tensor, credit) -> None:
        axes = self._axes(branches)
        assert rewards.shape == (axes[0], len(self.judges), *axes[1:])
        for branch in branches:
            place = self.place(branch)
            expected = torch.tensor(branch.rewards)
            found = rewards[(slice(None), slice(None), *place)]
            assert torch.equal(found.isnan(), expected.isnan())
            self._grow("reward", (found - expected).nan_to_num(0).abs().max())
            self._grow("advantage", abs(credit.advantages[place] - branch.advantage))
            assert bool(credit.informative[place[:2]]) == branch.informative

    def _compare_learning(self, gradients: list) -> None:
        assert [g is None for g in self.record.gradients] == [g is None for g in gradients]
        for found, expected in zip(self.record.gradients, gradients, strict=True):
            if expected is not None:
                self._grow("gradient", _distance(found, expected) / _length(expected))
        stepper = self.trainer.stepper
        for name, value in self.oracle.parameters.items():
            self._grow("parameter", (stepper.parameters[name].detach() - value).abs().max())
            self._grow("average", (stepper.average.average[name] - self.oracle.average[name]).abs().max())
        for log_ratio, gain in self.oracle.log_ratios:
            excess = torch.expm1(torch.tensor(log_ratio)).item() if gain else 0.0
            self.errors.clipped[0] += excess < -self.facts.clip and gain < 0
            self.errors.clipped[1] += excess > self.facts.clip and gain > 0

    def _grow(self, name: str, value) -> None:
        value = float(value)
        assert value == value, name
        setattr(self.errors, name, max(getattr(self.errors, name), value))


def _length(gradient: dict[str, Tensor]) -> float:
    return sum(float((value.double() ** 2).sum()) for value in gradient.values()) ** 0.5


def _distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return _length({name: found[name].double() - expected[name] for name in expected})


def pair(config: Config, facts: Facts, judges: Sequence[Judge], weights: Sequence[float]) -> Pair:
    """Both from the same first parameters."""
    trainer, record = make_trainer(config, panel_of(judges, weights))
    oracle = Oracle(facts, velocity_of_one, parameters_of(FIRST), parameters_of(REFERENCE))
    return Pair(facts, trainer, record, oracle, judges, weights)
