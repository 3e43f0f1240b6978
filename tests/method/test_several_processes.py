"""Two processes, here threads that meet, learn what one would: against the same oracle."""

from dataclasses import dataclass
from threading import Barrier, Thread

import pytest
import torch
from oracle import Facts, Oracle
from toy_trainer import (
    FIRST,
    REFERENCE,
    SHAPE,
    TEXTS,
    choosy,
    indifferent,
    make_trainer,
    panel_of,
    parameters_of,
    shifted,
    small,
    tilt,
    velocity_of_one,
)

from tempflow.parallel.ranks import Ranks
from tempflow.train import train_step

SIGMAS, CPU = tuple(shifted(5).tolist()), torch.device("cpu")


class Meeting:
    """Where two threads exchange tensors."""

    def __init__(self):
        self.barrier, self.table = Barrier(2, timeout=60), [None, None]

    def exchange(self, rank, value):
        self.table[rank] = value
        self.barrier.wait()
        both = list(self.table)
        self.barrier.wait()
        return both


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    meeting: Meeting

    def gather(self, values, dim):
        return torch.cat(self.meeting.exchange(self.rank, values.clone()), dim)

    def _average(self, bucket):
        for gradient in bucket:
            first, second = self.meeting.exchange(self.rank, gradient.clone())
            gradient.copy_((first + second) / 2)


def in_two_threads(config, judges, weights, iterations):
    """(trainers, gradients of every optimizer step) of two processes."""
    meeting, trainers, records, problems = Meeting(), [], [], []
    for rank in range(2):
        ranks = ThreadRanks(rank, 2, CPU, meeting)
        trainer, record = make_trainer(config, panel_of(judges, weights), ranks)
        trainers.append(trainer)
        records.append(record)

    def work(trainer):
        try:
            for iteration in range(iterations):
                train_step(trainer, iteration)
        except BaseException as problem:
            problems.append(problem)
            meeting.barrier.abort()

    threads = [Thread(target=work, args=(trainer,)) for trainer in trainers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems
    return trainers, records


CASES = {
    "seed groups, two updates": (
        ["explore.forks=[0,2]", "learn.updates=2", "objective.weighting=noise"],
        ((tilt,), (1.0,)), {"pool": (0, 2), "updates": 2, "weighting": "noise"}),
    "one group of all": (
        ["explore.forks=[0,2]", "credit.group=batch"],
        ((choosy, tilt), (1.0, 0.3)), {"pool": (0, 2), "group": "batch"}),
    "windows, global std, an update a fork": (
        ["explore.forks=[0,1]", "explore.window=2", "credit.group=prompt", "credit.std=global",
         "learn.updates_by=forks"],
        ((tilt,), (1.0,)), {"pool": (0, 1), "window": 2, "group": "prompt", "std": "global", "updates_by": "forks"}),
    "idle groups on one process, dropped": (
        ["explore.forks=[0,2]", "credit.idle=drop", "objective.kl=0.2", "learn.updates=2"],
        ((indifferent,), (1.0,)), {"pool": (0, 2), "idle": "drop", "kl": 0.2, "updates": 2}),
    "idle groups on one process, kept": (
        ["explore.forks=[0,2]", "learn.updates=2"], ((indifferent,), (1.0,)), {"pool": (0, 2), "updates": 2}),
    "each prompt a fork of its own": (
        ["explore.forks=first:3", "explore.take=2", "explore.draw=prompt"],
        ((tilt,), (1.0,)), {"pool": (0, 1, 2)}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_two_processes_learn_what_one_would(name):
    settings, (judges, weights), facts = CASES[name]
    config = small("objective.weighting=uniform", "explore.prompts=4", "explore.noises=2", "explore.siblings=2",
                   "objective.clip=0.004", "learn.inner_epochs=2", "learn.lr=0.02", *settings)  # fmt: skip
    trainers, records = in_two_threads(config, judges, weights, 2)
    told = Facts(SIGMAS, noises=2, siblings=2, clip=0.004, inner_epochs=2, lr=0.02, run_seed=3, processes=2, **facts)
    oracle = Oracle(told, velocity_of_one, parameters_of(FIRST), parameters_of(REFERENCE))
    steps = []
    for iteration in range(2):
        forks = trainers[0].method.plan(3, iteration, 4).steps.T.tolist()
        texts = [prompt.text for trainer in trainers for prompt in trainer.feed.at(iteration)[0]]
        branches = oracle.sample(iteration, texts, forks, torch.Size(SHAPE))
        oracle.judge(branches, judges, weights)
        steps += oracle.learn(iteration, branches)
    for trainer, record in zip(trainers, records, strict=True):
        assert [g is None for g in record.gradients] == [g is None for g in steps]
        for found, expected in zip(record.gradients, steps, strict=True):
            assert expected is None or all(torch.allclose(found[name].double(), expected[name], rtol=1e-4, atol=2e-6)
                                           for name in expected)  # fmt: skip
        for parameter, value in oracle.parameters.items():
            assert (trainer.stepper.parameters[parameter].detach() - value).abs().max() < 2e-6


def test_prompts_are_shared_out_and_walked_in_new_orders():
    """Five prompts, four an iteration: each comes once in five, in an order that changes; processes take halves."""
    config = small("explore.prompts=4", "explore.noises=2", "explore.siblings=2")
    panel, places = panel_of((tilt,), (1.0,)), [ThreadRanks(rank, 2, CPU, Meeting()) for rank in range(2)]
    alone, *feeds = (make_trainer(config, panel, *ranks)[0].feed for ranks in ((), *zip(places, strict=True)))
    seen = []
    for iteration in range(10):
        (first, _), (second, _) = (feed.at(iteration) for feed in feeds)
        assert first + second == alone.at(iteration)[0] and len(first) == 2
        seen += [prompt.text for prompt in first + second]
    turns = [tuple(seen[start : start + 5]) for start in range(0, 40, 5)]
    assert all(sorted(turn) == sorted(TEXTS) for turn in turns) and len(set(turns)) > 4
