"""The moving average of the parameters under training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import Parameter


class MovingAverage:
    """Exponential moving average of parameters, updated every few optimizer steps.

    Its decay warms up as min((1 + n) / (10 + n), limit), n counting optimizer steps from 0, as in Flow-GRPO's code. A
    limit of 0 keeps the average equal to the parameters.
    """

    def __init__(self, parameters: dict[str, Parameter], limit: float, every: int):
        self.parameters = parameters
        self.average = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self.limit, self.every, self.optimizer_steps = limit, every, 0
        self.exchanging = False
        """parameters and average are changing places"""

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
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Averages and parameters change places, one tensor at a time, so that no third copy is held."""
        self.exchanging = True
        for name, parameter in self.parameters.items():
            own = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(own)
        self.exchanging = False
