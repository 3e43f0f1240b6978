"""What can go wrong inside a process: each lays a trap before the run, which springs in a given iteration."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from faults.child import Inside, Trouble, before
from faults.scorer import Judge
from torch import Tensor

from tempflow import train
from tempflow.models.pipeline import PipelinePolicy
from tempflow.parallel import ranks

WHEN = 3
"""the iteration in which traps spring"""
NOBODY = 65534


def scorer(make: Callable[[Tensor], Any], rank: int | None = None) -> Trouble:
    """The scorer gives what `make` makes of its scores, or raises what that raises."""

    def strike(inside: Inside, make: Callable[[Tensor], Any]) -> None:
        Judge.trouble = lambda scores: make(scores) if inside.iteration == WHEN else scores

    return Trouble(strike, make, rank)


def raises(error: BaseException) -> Callable[[Tensor], Any]:
    def make(scores: Tensor) -> Any:
        raise error

    return make


def hangs(scores: Tensor) -> Any:
    time.sleep(3600)


def gold_raises() -> Trouble:
    """The second opinion fails at the evaluation after WHEN iterations."""
    from tempflow.digits.scorers import DigitsGold

    def strike(inside: Inside, _: Any) -> None:
        def fail(*_: Any) -> None:
            if inside.iteration >= WHEN:
                raise RuntimeError("the second opinion is out of order")

        before(DigitsGold, "__call__", fail)

    return Trouble(strike)


def not_a_number(iterations: range) -> Trouble:
    """Gradients of one tensor are NaN in these iterations."""

    def strike(inside: Inside, _: Any) -> None:
        backward = train.backward

        def spoilt(trainer: Any, batch: Any) -> Any:
            stats = backward(trainer, batch)
            if inside.iteration in iterations:
                next(iter(trainer.stepper.parameters.values())).grad.fill_(torch.nan)
            return stats

        train.backward = spoilt

    return Trouble(strike)


def velocity_not_a_number() -> Trouble:
    """The network gives NaN from WHEN on."""

    def strike(inside: Inside, _: Any) -> None:
        velocity = PipelinePolicy.velocity

        def spoilt(*arguments: Any, **named: Any) -> Tensor:
            found = velocity(*arguments, **named)
            return found * torch.nan if inside.iteration >= WHEN else found

        PipelinePolicy.velocity = spoilt

    return Trouble(strike)


def memory(rows: int) -> Trouble:
    """From WHEN on, tails of more than `rows` branches exhaust the memory."""

    def strike(inside: Inside, rows: int) -> None:
        finish_branches = train.finish_branches

        def exhausted(latents: Tensor) -> None:
            if inside.iteration >= WHEN and torch.is_grad_enabled() is False and len(latents) > rows:
                raise torch.OutOfMemoryError("out of memory: tried to allocate 20.00 GiB")

        def watched(*arguments: Any, **named: Any) -> Iterator:
            velocity = PipelinePolicy.velocity
            before(PipelinePolicy, "velocity", lambda policy, latents, *_: exhausted(latents))
            try:
                yield from finish_branches(*arguments, **named)
            finally:
                PipelinePolicy.velocity = velocity

        train.finish_branches = watched

    return Trouble(strike, rows)


def in_iteration(work: Callable[[], None], rank: int | None = None) -> Trouble:
    """`work` is called as iteration WHEN begins."""

    def strike(inside: Inside, work: Callable[[], None]) -> None:
        before(train, "train_step", lambda *_: work() if inside.iteration == WHEN else None)

    return Trouble(strike, work, rank)


def at_once(work: Callable[[], None], rank: int | None = None) -> Trouble:
    """`work` is called before the run."""
    return Trouble(lambda inside, work: work(), work, rank)


def small_files(size: int) -> Callable[[], None]:
    """No file may grow beyond `size` bytes, as under a quota."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def unprivileged() -> None:
    """A superuser writes everywhere; this process no longer does."""
    if os.geteuid() == 0:
        os.setegid(NOBODY)
        os.seteuid(NOBODY)


def fail_in_set_up() -> Trouble:
    """Something only this rank meets while it is set up."""

    def strike(inside: Inside, _: Any) -> None:
        def fail(*_: Any) -> None:
            raise OSError(5, "Input/output error", "/data/prompts.txt")

        from tempflow.run import assembly

        before(assembly, "load_policy", fail)

    return Trouble(strike, rank=1)


def little_patience(seconds: float) -> Callable[[], None]:
    """Collectives time out after so many seconds beside what scorers may take."""

    def work() -> None:
        ranks.MARGIN = seconds

    return work
