"""Parts of a run that also tell the benchmark what went through them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tempflow.explore.schedule import NoiseSchedule
from tempflow.explore.tails.engine import TailEngine, TailWork
from tempflow.policy import Conditioning


class Recording:
    """A score queue that remembers the rewards it gave."""

    def __init__(self, queue: Any):
        self.queue, self.rewards = queue, torch.empty(0)

    def collect(self) -> Tensor:
        self.rewards = self.queue.collect()
        return self.rewards

    def __getattr__(self, name: str) -> Any:
        return getattr(self.queue, name)


class Counting:
    """A tail engine that counts the network rows it computes, and never anew."""

    def __init__(self, engine: TailEngine):
        self.engine, self.total = engine, 0

    @property
    def rows(self) -> int:
        return self.engine.rows

    @property
    def work(self) -> TailWork:
        return self.engine.work

    def finish(
        self, latents: Tensor, first_steps: Sequence[int], conditioning: Conditioning, schedule: NoiseSchedule
    ) -> None:
        before = self.work.computed
        self.engine.finish(latents, first_steps, conditioning, schedule)
        self.total += self.work.computed - before
