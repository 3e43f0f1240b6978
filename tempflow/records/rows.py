"""metrics.jsonl: one line for the start of a run, one for each iteration, one for each evaluation.

`read_metrics` gives the lines of one step as one row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tempflow.common.errors import BadInput
from tempflow.common.files import read_text, write_atomically
from tempflow.records.shape import check_line
from tempflow.records.trackers import Trackers


@dataclass(frozen=True, kw_only=True)
class StartRow:
    """What stays the same for a whole run."""

    step: int = 0
    """Always 0."""
    seconds: float = 0.0
    """Always 0."""
    rollouts: int = 0
    """Always 0."""
    sigmas: list[float]
    """The T+1 sigmas of a trajectory."""
    loss_weights: list[float]
    """Weight of the policy loss at every step but the last; 0 at a step that is never trained."""
    picture_prompts: list[str]
    """Prompts of the pictures in the report."""
    tail_rows: int
    """Branches that travel together."""


@dataclass(frozen=True, kw_only=True)
class IterationRow:
    """One iteration of explore, credit, learn. What could not be measured is left out."""

    step: int
    """Iterations done."""
    seconds: float = 0.0
    """Wall-clock time of the loop, evaluations included."""
    training_seconds: float = 0.0
    """The same without evaluations."""
    rollouts: int = 0
    """Branches explored so far."""
    network_rows: int = 0
    """Rows of the network so far, evaluations apart: trunks, tails and learning (forecast/cost.py)."""
    rollouts_per_hour: float = 0.0
    """Branches of this iteration by the time it took."""
    reward_mean: float | None
    """Mean of the weighted sum of the rewards, over all branches."""
    reward_means: dict[str, float | None]
    """Mean of each reward."""
    reward_std_per_step: list[float | None]
    """Standard deviation of the reward among the siblings of a fork, mean over the forks at each step but the last."""
    rewards_missing: int
    """Rewards that a scorer had no opinion of."""
    groups_masked: int
    """Groups whose rewards do not differ, or of which fewer than two are known."""
    idle_share: float = 0.0
    """The same by the number of groups."""
    tail_waste: float
    """Part of the tails' network rows that was computed for nothing."""
    ratio_mean: float | None = None
    """Mean ratio of new to old density."""
    ratio_max: float | None = None
    """Largest ratio."""
    clip_fraction: float | None = None
    """Part of the decisions whose ratio lies outside the clip range."""
    approx_kl: float | None = None
    """Mean of ratio - 1 - log ratio: the divergence from the sampling policy."""
    kl: float | None = None
    """Divergence from the model before training, before objective.kl."""
    log_ratio_mean: float | None = None
    """Mean of |log ratio|."""
    log_ratio_max: float | None = None
    """Largest |log ratio|."""
    first_log_ratio_mean: float | None = None
    """The same of the first update, where the policy has not moved: anything but 0 is numerical drift."""
    first_log_ratio_max: float | None = None
    """The same of the first update."""
    grad_norm: float
    """Mean norm of the gradient before clipping."""
    optimizer_bytes: int
    """Bytes of the optimizer's state."""
    loss_scale: float | None = None
    """Factor on the loss in fp16."""
    skipped_steps: int = 0
    """Optimizer steps that were not taken, since a gradient was not finite; in fp16 some while the loss scale falls."""
    nonfinite_losses: int = 0
    """Batches whose loss or ratio was not finite."""
    nonfinite_latents: int = 0
    """Images whose latents were not finite, by the transformer; they have no reward."""
    nonfinite_images: int = 0
    """Images whose latents were finite and they themselves not, by the decoder; they have no reward."""
    warnings: list[str] = field(default_factory=list)
    """What was found worrying at this iteration (run/watch.py)."""
    phase_seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by phase; phases beside each other each count their own."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRow:
    """One evaluation on held-out prompts."""

    step: int
    """Iterations done before."""
    seconds: float
    """Wall-clock time of the loop, this evaluation included."""
    scores: dict[str, float | None]
    """Mean of each held-out score; each is a field of its own in the file: reward_test, gold, gold_NAME, ..."""
    scores_missing: int
    """Scores that a scorer had no opinion of."""
    nonfinite_latents: int = 0
    """As of an iteration."""
    nonfinite_images: int = 0
    """As of an iteration."""
    gold_fall: dict[str, float] | None = None
    """Gold scores that have fallen while the reward rose, and by how much."""
    kinds: dict[str, float] | None = None
    """Means of held-out scores by kind of prompt, where metadata name several kinds: gold/counting, ..."""
    phase_seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by phase."""


ADDED = ("nonfinite_latents", "nonfinite_images")
"""Fields that are added up where an iteration is evaluated, too."""
LARGEST = 2**32
"""Bytes of a metrics.jsonl that is read."""

Row = StartRow | IterationRow | EvaluationRow


def plain_row(row: Row) -> dict[str, Any]:
    """A row as JSON values; optional fields without a value are left out."""
    values = asdict(row)
    scores = values.pop("scores", {})
    optional = {name for name, info in type(row).__dataclass_fields__.items() if info.default is None}
    known = {name: value for name, value in values.items() if value is not None or name not in optional}
    return known | scores


class MetricsWriter:
    """metrics.jsonl, one object a line, and the trackers.

    Args:
        last_step: of an earlier part of the run, lines to this step stay; None: none do.
        length: and only those within so many bytes; None: wherever they stand.
        trackers: what else is told each line; None: nothing.
    """

    def __init__(
        self, folder: Path, last_step: int | None, length: int | None = None, trackers: Trackers | None = None
    ):
        self.path = folder / "metrics.jsonl"
        kept = [row for row in _lines(self.path, length) if last_step is not None and row["step"] <= last_step]
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self.trackers = trackers or Trackers(folder)
        self.trackers.begin(kept)

    def write(self, row: Row) -> None:
        """Appends a line, whole or not at all, and tells it to the trackers."""
        values = plain_row(row)
        with self.path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                _write_all(file, (json.dumps(values) + "\n").encode())
            except OSError:
                file.truncate(before)
                raise
        self.trackers.tell(values)

    def close(self) -> None:
        """Ends the trackers."""
        self.trackers.close()


def _write_all(file: Any, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, one per step; none where there is no file; a torn last line is left out."""
    rows: dict[int, dict[str, Any]] = {}
    for line in _lines(path):
        row = rows.setdefault(line["step"], {})
        phases = row.get("phase_seconds", {}) | line.get("phase_seconds", {})
        counts = {name: _count(row.get(name)) + _count(line[name]) for name in ADDED if name in line}
        row.update(line, **counts)
        row["phase_seconds"] = phases
    return list(rows.values())


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _lines(path: Path, length: int | None = None) -> list[Mapping[str, Any]]:
    """The rows of a file, within its first `length` bytes."""
    rows = []
    text = read_text("metrics", path, LARGEST).encode()[:length].decode(errors="ignore") if path.exists() else ""
    for number, line in enumerate(text.split("\n"), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        except (ValueError, RecursionError) as error:
            raise BadInput("metrics", f"{path}:{number}", "is no row of a run") from error
        if not isinstance(row, dict):
            raise BadInput("metrics", f"{path}:{number}", "is no row of a run")
        check_line(row, f"{path}:{number}")
        rows.append(row)
    return rows
