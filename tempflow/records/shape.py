"""Whether rows of a metrics.jsonl are those of a run, before anything is drawn from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tempflow.common.errors import BadInput

MOST_STEPS, MOST_PICTURES = 10_000, 1000


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e100 and math.isfinite(value)


def _known(value: Any) -> bool:
    """A number, or none where it could not be measured; NaN and infinity are of older versions."""
    return value is None or (type(value) is float and not math.isfinite(value)) or _number(value)


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MOST_STEPS and all(map(_known, value))


def _words(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MOST_PICTURES and all(isinstance(item, str) for item in value)


def _phases(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_known, value.values()))


DRAWN: dict[str, Callable[[Any], bool]] = {
    "step": _number,
    "seconds": _number,
    "reward_mean": _known,
    "reward_test": _known,
    "reward_std_per_step": _numbers,
    "loss_weights": _numbers,
    "picture_prompts": _words,
    "phase_seconds": _phases,
    "kinds": _phases,
}
"""Field -> whether a value can be drawn. Fields that begin with `gold` are scores, but for `gold_fall`."""


def check_line(line: Mapping[str, Any], place: str) -> None:
    """Refuses a line whose fields hold something else than those of a run.

    Raises:
        BadInput: naming the line and the field.
    """
    if type(line.get("step")) is not int or line["step"] < 0:
        raise BadInput("metrics", place, "is no row of a run: it has no step")
    for name, value in line.items():
        usual = _known if name.startswith("gold") and name != "gold_fall" else _anything
        if not DRAWN.get(name, usual)(value):
            raise BadInput("metrics", place, f"is no row of a run: its {name} is {str(value)[:40]!r}")


def _anything(value: Any) -> bool:
    return True


def check_drawable(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Refuses rows that cannot stand in one figure.

    Raises:
        BadInput: a row without its time, or forks that are not those of the other rows.
    """
    lengths = {len(row["reward_std_per_step"]) for row in rows if "reward_std_per_step" in row}
    if len(lengths) > 1 or any("seconds" not in row for row in rows):
        raise BadInput("metrics", path, "its rows are not those of one run: lengths or times differ")
