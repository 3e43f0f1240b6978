"""Seconds by phase of an iteration."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import torch

Item = TypeVar("Item")


class PhaseClock:
    """Seconds by phase of one iteration. Phases that run beside each other each count their own time.

    On a GPU a phase lasts from the moment its stream reaches its beginning to the moment it reaches its end, as CUDA
    events see them, so that measuring makes the host wait for nothing before `read`.
    """

    phase: ClassVar[str] = "set-up"
    """of this process's main thread: the last that began"""

    def __init__(self, device: torch.device):
        self.device = device
        self.spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = self._now()
        if threading.current_thread() is threading.main_thread():
            PhaseClock.phase = phase
        yield
        self.spans.append((phase, start, self._now()))  # one step, for several threads measure

    def _now(self) -> Any:
        """A moment: seconds, or on a GPU an event in the current stream."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _between(self, start: Any, end: Any) -> float:
        if self.device.type != "cuda":
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def over(self, phase: str, items: Iterable[Item]) -> Iterator[Item]:
        """The items, the time it takes to make each counted as `phase`; what is done with them between is not."""
        iterator, done = iter(items), object()
        while True:
            with self(phase):
                item = next(iterator, done)
            if item is done:
                return
            yield item

    def read(self) -> dict[str, float]:
        """The seconds so far, rounded to a tenth of a millisecond; the clock starts again."""
        spans, self.spans = self.spans, []
        seconds: dict[str, float] = {}
        for phase, start, end in spans:
            seconds[phase] = seconds.get(phase, 0.0) + self._between(start, end)
        return {phase: round(value, 4) for phase, value in seconds.items()}
