"""What to worry about in the figures of a run, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WARNINGS = {
    "reward_spread": "the rewards of siblings hardly differ any more: images have become alike, or prompts are solved",
    "reward_fall": "the reward is far below its start: what was learnt does harm",
    "idle_groups": "in most groups all rewards are alike, so that they teach nothing",
    "first_log_ratio": "learning does not repeat the network calls of sampling; ratios are clipped for rounding alone",
}
"""name of a warning in the metrics -> words"""
COUNTS = {
    "skipped_steps": "optimizer steps were not taken, since a gradient was not finite",
    "nonfinite_losses": "batches had a loss that was not finite",
    "nonfinite_latents": "images were not finite in their latents",
    "nonfinite_images": "images were not finite after decoding",
    "rewards_missing": "rewards are missing, since a scorer had no opinion",
    "scores_missing": "held-out scores are missing, since a scorer had no opinion",
}
"""field of a row -> what so many of are amiss"""


@dataclass(frozen=True)
class Worry:
    """One of them."""

    step: int | None
    """the iteration at which it was found; None for what is counted over the run"""
    words: str


def worries(rows: Sequence[Mapping[str, Any]]) -> list[Worry]:
    """Warnings in the order in which they came, then what was counted."""
    found = [Worry(row["step"], words) for row in rows for words in _of_row(row)]
    counts = {words: sum(_count(row.get(field)) for row in rows) for field, words in COUNTS.items()}
    return found + [Worry(None, f"{count:,} {words}") for words, count in counts.items() if count]


def _of_row(row: Mapping[str, Any]) -> Iterator[str]:
    warnings, falls = row.get("warnings"), row.get("gold_fall")
    for name in warnings if isinstance(warnings, list) else ():
        yield WARNINGS.get(name, str(name)) if isinstance(name, str) else str(name)
    for name, fall in falls.items() if isinstance(falls, dict) else ():
        amount = f"{fall:.4g}" if isinstance(fall, int | float) else "?"
        yield f"{name} is {amount} below its best while the reward rose: the model may please the scorer only"


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0
