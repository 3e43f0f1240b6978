"""What a run measures: averages within an iteration, time by phase, and where the figures go."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from tempflow_kernels import BranchLossStats
from torch import Tensor

from tempflow.common.errors import BadInput
from tempflow.common.files import write_atomically

Item = TypeVar("Item")
MAXIMA = ("log_ratio_max", "ratio_max")


class LossRecord:
    """Statistics of the batches of one iteration, kept on the device until they are asked for."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []
        self.updates: list[int] = []

    def add(self, stats: BranchLossStats, update: int) -> None:
        """One batch of the optimizer step number `update` of this iteration."""
        self.batches.append(torch.stack(tuple(stats)).detach().float())
        self.updates.append(update)

    def totals(self) -> Tensor:
        """(1, 2, 1 + figures): the number of batches, then each figure's sum (maximum for *_max), over all updates and
        over the first alone."""
        width = len(BranchLossStats._fields)
        table = torch.stack(self.batches).cpu() if self.batches else torch.zeros(0, width)
        first = torch.tensor(self.updates, dtype=torch.int64) == 0
        return torch.stack((_total(table), _total(table[first]))).unsqueeze(0)


def _total(table: Tensor) -> Tensor:
    columns = table.unbind(1)
    maxima = [name in MAXIMA for name in BranchLossStats._fields]
    values = [(column.max() if top else column.sum()) if len(column) else torch.tensor(0.0)
              for column, top in zip(columns, maxima, strict=True)]  # fmt: skip
    return torch.stack([torch.tensor(float(len(table))), *values])


def loss_figures(totals: Tensor) -> dict[str, float]:
    """Means (maxima for *_max) over the batches of all ranks, from their totals (ranks, 2, 1 + figures).

    first_log_ratio_* are those of the first update, where the policy has not moved yet: anything but 0 there is
    numerical drift between sampling and learning. Nothing where no rank had a batch.
    """
    everything, first = (_average(part) for part in totals.unbind(1))
    drift = {f"first_{name}": first[name] for name in ("log_ratio_mean", "log_ratio_max") if first}
    return everything | drift


def _average(totals: Tensor) -> dict[str, float]:
    count = totals[:, 0].sum()
    if not count:
        return {}
    columns = zip(BranchLossStats._fields, totals[:, 1:].unbind(1), strict=True)
    return {name: (column.max() if name in MAXIMA else column.sum() / count).item() for name, column in columns}


def known_mean(values: Tensor, digits: int | None = None) -> float | None:
    """Mean of the values that are not NaN, rounded if `digits` are given; None if there are none."""
    mean = values.nanmean().item()
    return None if math.isnan(mean) else mean if digits is None else round(mean, digits)


class PhaseClock:
    """Seconds by phase of one iteration. Phases that run beside each other each count their own time.

    On a GPU a phase lasts from the moment its stream reaches its beginning to the moment it reaches its end, as CUDA
    events see them, so that measuring makes the host wait for nothing before `read`.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = self._now()
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
        """The seconds so far, rounded to a tenth of a millisecond; the clock starts anew."""
        spans, self.spans = self.spans, []
        seconds: dict[str, float] = {}
        for phase, start, end in spans:
            seconds[phase] = seconds.get(phase, 0.0) + self._between(start, end)
        return {phase: round(value, 4) for phase, value in seconds.items()}


class MetricsWriter:
    """metrics.jsonl, one object a line, and the trackers. Of an earlier part of the run, lines to `last_step` stay."""

    def __init__(self, folder: Path, trackers: list[str], run_name: str, last_step: int | None):
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if last_step is not None and row["step"] <= last_step]
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self.sinks = [TRACKERS[name](folder, run_name) for name in trackers]

    def write(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for sink in self.sinks:
            sink(flat_numbers(row), row["step"])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; none where there is no file; a torn last line is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def flat_numbers(row: dict[str, Any]) -> dict[str, float]:
    """Numbers of a row under one name each: {"phase_seconds": {"tails": 1.0}} becomes phase_seconds/tails."""
    flat = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{key}": number for key, number in value.items()}
        elif isinstance(value, list):
            flat |= {f"{name}/{index}": number for index, number in enumerate(value) if isinstance(number, int | float)}
        elif isinstance(value, int | float):
            flat[name] = value
    return flat


def check_trackers(names: Sequence[str]) -> None:
    """Refuses a tracker whose package is absent.

    Raises:
        BadInput: with the command that installs it.
    """
    if "wandb" in names and importlib.util.find_spec("wandb") is None:
        raise BadInput("run.trackers", "wandb", "is not installed: pip install 'tempflow[wandb]'")


def _tensorboard(folder: Path, run_name: str):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def sink(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return sink


def _wandb(folder: Path, run_name: str):
    import wandb

    run = wandb.init(project="tempflow", name=run_name, dir=str(folder), resume="allow")
    return lambda values, step: run.log(values, step=step)


TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb}
