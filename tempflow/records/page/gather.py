"""What report.html shows of a run, read from its folder."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tempflow.common.errors import BadInput
from tempflow.common.files import read_text
from tempflow.records.gallery import Small, read_small
from tempflow.records.page.facts import SavedFile, SettingsTable, saved_files, settings_table
from tempflow.records.page.worries import Worry, worries
from tempflow.records.rows import read_metrics
from tempflow.records.shape import check_drawable
from tempflow.records.versions import read_versions

MOST_ROWS = 2000
"""Iterations that are drawn; of a longer run evenly spread ones, and all that were evaluated."""
LARGEST = 2**26
"""bytes of a file of scores that is read"""

Row = dict[str, Any]


@dataclass(frozen=True)
class Page:
    """All that the page holds."""

    name: str
    rows: Sequence[Row]
    """one a step, as of `read_metrics`; numbers that are not finite are None"""
    prompts: Sequence[str]
    """of the pictures"""
    pictures: Mapping[int, Sequence[Small]]
    """evaluation -> pictures, in the order of the prompts"""
    scores: Mapping[str, Sequence[float | None]]
    """scorer -> scores by held-out prompt, of the last evaluation"""
    worries: Sequence[Worry]
    settings: SettingsTable
    saved: Sequence[SavedFile]
    versions: Mapping[str, str]
    left_out: int
    """iterations that are not drawn, for their number"""

    @property
    def evaluations(self) -> list[Row]:
        return [row for row in self.rows if "scores_missing" in row]

    @property
    def score_names(self) -> list[str]:
        """reward_test, then the golds."""
        names = {name for row in self.rows for name, value in row.items() if _is_score(name, value)}
        return sorted(names, key=lambda name: (not name.startswith("reward"), name))

    @property
    def kind_names(self) -> list[str]:
        """reward_test/counting, gold/counting, ...: scores by kind of prompt."""
        return list(dict.fromkeys(name for row in self.evaluations for name in row.get("kinds", {})))

    def for_scripts(self) -> dict[str, Any]:
        """What the page's scripts draw, as JSON values, but for the pictures themselves."""
        first = next(iter(self.pictures.values()), ())
        pictures = {"size": [first[0].width, first[0].height] if first else None, "steps": list(self.pictures)}
        return {"rows": list(self.rows), "prompts": list(self.prompts), "pictures": pictures,
                "scores": dict(self.scores), "names": self.score_names}  # fmt: skip

    def images(self) -> Iterator[tuple[int, list[str]]]:
        """Each evaluation with its pictures, as addresses that hold them."""
        for step, row in self.pictures.items():
            yield step, [_as_uri(small) for small in row]


def gather(folder: Path) -> Page:
    """Reads a run's folder.

    Raises:
        BadInput: no rows of a run, or files that hold something else.
    """
    path = folder / "metrics.jsonl"
    rows = read_metrics(path)
    if not rows:
        raise BadInput("run.dir", folder, "holds no metrics.jsonl with a line in it; give the folder of a run")
    check_drawable(rows, path)
    rows = [_finite(row) for row in rows]
    steps = [row["step"] for row in rows if "scores_missing" in row]
    prompts = rows[0].get("picture_prompts", [])
    drawn = _thinned(rows)
    return Page(
        name=folder.resolve().name,
        rows=drawn,
        prompts=prompts,
        pictures=read_small(folder, steps, len(prompts)) if prompts else {},
        scores=_scores(folder / "scores" / f"step_{steps[-1]:06d}.json") if steps else {},
        worries=worries(rows),
        settings=settings_table(folder / "config.yaml"),
        saved=saved_files(folder),
        versions=read_versions(folder),
        left_out=len(rows) - len(drawn),
    )


def _is_score(name: str, value: Any) -> bool:
    return name.startswith(("reward_test", "gold")) and isinstance(value, int | float)


def _as_uri(small: Small) -> str:
    return f"data:image/webp;base64,{base64.b64encode(small.data).decode()}"


def _finite(value: Any) -> Any:
    """The value with None in place of numbers that JSON does not know."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _thinned(rows: list[Row]) -> list[Row]:
    every = -(-len(rows) // MOST_ROWS)
    return [row for number, row in enumerate(rows) if number % every == 0 or "scores_missing" in row or row is rows[-1]]


def _scores(path: Path) -> dict[str, list[float | None]]:
    """Scores by prompt; none where there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(read_text("scores", path, LARGEST))
        return {str(name): [None if value is None else float(value) for value in row] for name, row in found.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput("scores", path, "holds no scores by prompt") from error
