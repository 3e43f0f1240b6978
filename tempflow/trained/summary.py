"""What an evaluation comes to: means with standard errors by prompt, and differences in pairs of one noise.

Noises of a prompt are no independent draws of what is of interest, prompts are: a score is first averaged over the
noises of each prompt, then over prompts, whose spread gives the standard error. Differences to the model before
training are taken picture by picture, of the same prompt and noise, and averaged alike; their 95 % intervals are
Student's.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from tempflow.credit.advantage import known_mean
from tempflow.prompts import Prompt
from tempflow.trained.scoring import TOTAL
from tempflow.trained.source import Member

ALL = "all"
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts."""

    mean: float
    error: float
    """its standard error; NaN for a single prompt"""
    low: float
    high: float
    """of the 95 % interval"""
    prompts: int


@dataclass(frozen=True)
class Line:
    """One scorer's view of one model, over all prompts or those of one kind."""

    scorer: str
    kind: str
    model: str
    score: Estimate
    difference: Estimate | None
    """to the model before training, in pairs; None of that model itself, and where it was left out"""


def estimate(by_prompt: Tensor) -> Estimate:
    """Of (n,) values, NaN where there is none; the mean is the one that a run tells of such scores, to the bit."""
    known = by_prompt[~by_prompt.isnan()]
    count = len(known)
    mean = known_mean(by_prompt)
    error = float(stats.sem(known.double().numpy())) if count > 1 else math.nan
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * error if count > 1 else math.nan
    mean = math.nan if mean is None else mean
    return Estimate(mean, error, mean - half, mean + half, count)


@dataclass(frozen=True)
class Scored:
    """All scores of an evaluation."""

    members: Sequence[Member]
    names: Sequence[str]
    """of scorers, M"""
    prompts: Sequence[Prompt]
    tables: Sequence[Tensor]
    """of each member, (M, n N) fp32, prompt by prompt; NaN where there is no opinion"""
    baseline: int | None
    """which member the others are compared with"""

    def scores(self, member: int, scorer: int) -> Tensor:
        """(n, N) fp32."""
        return self.tables[member][scorer].view(len(self.prompts), -1)

    def lines(self) -> list[Line]:
        """By scorer, kind and model; all prompts first."""
        kinds = [prompt.kind for prompt in self.prompts]
        named = list(dict.fromkeys(filter(None, kinds)))
        groups = [(ALL, torch.ones(len(kinds), dtype=torch.bool))]
        groups += [(kind, torch.tensor([each == kind for each in kinds])) for kind in named]
        return [self._line(scorer, group, where, member) for scorer in range(len(self.names))
                for group, where in groups for member in range(len(self.members))]  # fmt: skip

    def _line(self, scorer: int, kind: str, where: Tensor, member: int) -> Line:
        own, difference = self.scores(member, scorer)[where], None
        if self.baseline is not None and member != self.baseline:
            apart = own.double() - self.scores(self.baseline, scorer)[where]
            difference = estimate(apart.nanmean(1))
        return Line(self.names[scorer], kind, self.members[member].label, estimate(own.nanmean(1)), difference)

    def missing(self) -> int:
        """How many opinions of scorers are missing."""
        rows = [place for place, name in enumerate(self.names) if name != TOTAL]
        return sum(int(table[rows].isnan().sum()) for table in self.tables)

    def to_csv(self) -> str:
        """A row per model, prompt, noise and scorer."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["model", "iteration", "weights", "prompt", "text", "kind", "noise", "scorer", "score"])
        for place, member in enumerate(self.members):
            run = member.run
            head = [member.label, "" if run is None else run.iteration, "" if run is None else run.weights]
            tables = [self.scores(place, scorer).tolist() for scorer in range(len(self.names))]
            for slot, prompt in enumerate(self.prompts):
                for noise in range(len(tables[0][slot])):
                    values = [table[slot][noise] for table in tables]
                    writer.writerows([*head, slot, prompt.text, prompt.kind, noise, name,
                                      "" if math.isnan(value) else value]
                                     for name, value in zip(self.names, values, strict=True))  # fmt: skip
        return buffer.getvalue()


def to_json(scored: Scored, about: Mapping[str, Any]) -> str:
    """What was evaluated, and the lines of the table; null where there is no number."""
    lines = [_finite(asdict(line)) for line in scored.lines()]
    models = [member.describe() for member in scored.members]
    return json.dumps({**about, "models": models, "missing": scored.missing(), "lines": lines}, indent=1) + "\n"


def _finite(value: Any) -> Any:
    """The same without NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


HEADER = ("scorer", "kind", "model", "prompts", "mean", "", "difference", "", "95 % interval")


def table(lines: Sequence[Line]) -> str:
    """The lines as text in columns; what stands above is not repeated, and a column without anything left out."""
    rows, above = [HEADER], Above()
    for line in lines:
        numbers = (*_numbers(line.score, "")[:2], *_difference(line))
        rows.append((*above.unless_repeated(line.scorer, line.kind), line.model, str(line.score.prompts), *numbers))
    kept = [place for place in range(len(HEADER)) if any(row[place] for row in rows[1:])]
    widths = {place: max(len(row[place]) for row in rows) for place in kept}
    return "\n".join("  ".join(row[place].ljust(widths[place]) for place in kept).rstrip() for row in rows)


class Above:
    """What stands in the first columns of the lines above."""

    def __init__(self) -> None:
        self.cells: tuple[str, ...] = ()

    def unless_repeated(self, *cells: str) -> tuple[str, ...]:
        """The cells, empty from the left as long as they are those above."""
        above, self.cells = self.cells, cells
        return tuple("" if cells[: place + 1] == above[: place + 1] else cell for place, cell in enumerate(cells))


def _difference(line: Line) -> tuple[str, str, str]:
    return ("", "", "") if line.difference is None else _numbers(line.difference, "+")


def _numbers(value: Estimate, sign: str) -> tuple[str, str, str]:
    """Mean, error and interval in words."""
    if not value.prompts:
        return "no opinion", "", ""
    mean = f"{value.mean:{sign}.4f}"
    if math.isnan(value.error):
        return mean, "", ""
    return mean, f"± {value.error:.4f}", f"[{value.low:+.4f}, {value.high:+.4f}]"
