"""The results of `compare.py`: a file that is appended to and read again, so that several calls make one comparison."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rollouts.set_up_times import MARGIN, assumed_seconds
from torch import Tensor

IDENTITY = ("architecture", "device", "torch", "commit", "overrides")
"""Rows that differ in one of these are another comparison's."""


def read_rows(file: Path) -> list[dict[str, Any]]:
    """All rows; one that was cut off by the end of a process is left out."""
    return list(_rows(file)) if file.is_file() else []


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def of_one_comparison(rows: list[dict[str, Any]], like: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Rows of the comparison of `like`, or of the newest one."""
    like = like or (rows[-1] if rows else {})
    return [row for row in rows if all(row.get(name) == like.get(name) for name in IDENTITY)]


class Results:
    """What one comparison knows, from earlier calls and this one. `identity` goes into every row."""

    def __init__(self, file: Path, identity: dict[str, Any], again: bool = False):
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.identity = file, identity
        self.rows = [] if again else of_one_comparison(read_rows(file), identity)
        if again:
            kept = [row for row in read_rows(file) if not of_one_comparison([row], identity)]
            file.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

    def write(self, kind: str, **values: Any) -> None:
        """One row, in the file at once."""
        row = {"kind": kind, **values, **self.identity}
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")
        self.rows.append(row)

    def of(self, kind: str, variant: str | None = None) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["kind"] == kind and variant in (None, row["variant"])]

    def broken(self) -> set[str]:
        """Variants that left the device out of order, and would again."""
        return {row["variant"] for row in self.of("skipped") if row.get("broken")}

    def rounds(self, variant: str) -> int:
        """Iterations that were timed; the next one has this number."""
        return len(self.of("iteration", variant))

    def rewards(self, number: int) -> Tensor | None:
        """(S, R, K) of the reference in that round, if it was run."""
        found = [row["rewards"] for row in self.of("iteration") if row["round"] == number and "rewards" in row]
        return torch.tensor(found[0]) if found else None

    def set_up_seconds(self, kind: tuple[str, ...]) -> float:
        """What setting up a variant of that kind takes: as measured, or as assumed where none was."""
        measured = [sum(row[part] for part in ("set_up_seconds", "first_seconds", "again_seconds"))
                    for row in self.of("warm-up") if tuple(row["set_up_kind"]) == kind]  # fmt: skip
        return MARGIN * measured[-1] if measured else assumed_seconds(kind)

    def iteration_seconds(self, variant: str) -> float:
        """Median seconds of an iteration: its own, or that of the last one timed, which is seldom faster."""
        timed = self.of("iteration", variant) or self.of("iteration")[-1:]
        return median(row["seconds"] for row in timed) if timed else 0.0
