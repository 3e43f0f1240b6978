"""The optimizer of the trained parameters and their moving average."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from tempflow.settings import LearnConfig

OPTIMIZERS = {"adamw": torch.optim.AdamW}


def make_optimizer(learn: LearnConfig, parameters: list[Parameter]) -> torch.optim.Optimizer:
    """The optimizer that `learn` names, with its settings."""
    return OPTIMIZERS[learn.optimizer](
        parameters, lr=learn.lr, betas=learn.betas, eps=learn.eps, weight_decay=learn.weight_decay, fused=True
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learn: LearnConfig, iteration: int) -> None:
    """The learning rate of an iteration, a function of its number alone, so that resume needs no state for it."""
    left = {"constant": 1.0, "linear": 1 - iteration / learn.iterations}[learn.lr_schedule]
    for group in optimizer.param_groups:
        group["lr"] = learn.lr * left


class MovingAverage:
    """Exponential moving average of parameters, updated every few optimizer steps.

    Its decay warms up as min((1 + n) / (10 + n), limit), n counting optimizer steps from 0, as in Flow-GRPO's code. A
    limit of 0 keeps the average equal to the parameters.
    """

    def __init__(self, parameters: dict[str, Parameter], limit: float, every: int):
        self.parameters = parameters
        self.average = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self.limit, self.every, self.optimizer_steps = limit, every, 0

    @torch.no_grad()
    def update(self) -> None:
        """To be called once after each optimizer step."""
        self.optimizer_steps += 1
        if self.limit and self.optimizer_steps % self.every:
            return
        count = self.optimizer_steps - 1
        decay = min((1 + count) / (10 + count), self.limit)
        averages, current = list(self.average.values()), list(self.parameters.values())
        torch._foreach_lerp_(averages, current, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the parameters are the averaged ones; their own values come back afterwards."""
        own = self._exchange(self.average)
        try:
            yield
        finally:
            self._exchange(own)

    @torch.no_grad()
    def _exchange(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies values into the parameters, in place, and returns what was there."""
        before = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
        return before
