"""What a run measures: averages within an iteration, time by phase, and where the figures go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tempflow.common.files import write_atomically
from tempflow.records.trackers import TRACKERS, flat_numbers


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


