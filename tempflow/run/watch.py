"""What a run's figures should not do: each a warning in words, once, and by its name in the metrics.

Each is told by the means of the last WINDOW iterations beside those of the first WINDOW, which a resumed run reads from
its metrics. Nothing is stopped: a collapse and a task that is solved look alike in figures, and not in pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WINDOW = 5
"""iterations"""
SPREAD_SHARE = 0.1
"""Of the reward's standard deviation among siblings at the start: below, siblings hardly differ any more."""
REWARD_FALL = 2.0
"""Standard deviations among siblings at the start by which the mean reward may fall."""
IDLE_SHARE = 0.8
"""Of all groups, those whose rewards do not differ: above, most of an iteration is computed for nothing."""


@dataclass(frozen=True)
class Stretch:
    """Means over some iterations."""

    reward: float
    spread: float
    """of the reward among siblings, over the forks"""
    idle: float
    """part of the groups that tell nothing"""


@dataclass(frozen=True)
class Sign:
    """Something to warn of."""

    shows: Callable[[Stretch, Stretch], bool]
    """of the first and the last iterations"""
    words: str
    """with their figures to be filled in"""


SIGNS = {
    "reward_spread": Sign(
        lambda start, now: now.spread < SPREAD_SHARE * start.spread,
        "the rewards of siblings differ by {now.spread:.3g}, at the start by {start.spread:.3g}: images have become "
        "alike, or the prompts are solved; look at the pictures, go back to an older checkpoint, lower learn.lr or set "
        "objective.kl",
    ),
    "reward_fall": Sign(
        lambda start, now: start.reward - now.reward > REWARD_FALL * start.spread > 0,
        "the reward is {now.reward:.4g}, at the start {start.reward:.4g}: what was learnt does harm; go back to an "
        "older checkpoint and lower learn.lr",
    ),
    "idle_groups": Sign(
        lambda start, now: now.idle > IDLE_SHARE,
        "in {now.idle:.0%} of the groups all rewards are alike, so that they teach nothing; take prompts that are "
        "neither solved nor hopeless, more siblings or noises, or a scorer that grades finer",
    ),
}
DRIFT = "first_log_ratio"
DRIFT_WORDS = (
    "the first log-ratio is {drift:.3g}, beyond objective.clip={clip:g}: learning does not repeat the network calls of "
    "sampling, and ratios are clipped for rounding alone. Name a backend (model.attention=native), let learn.rows "
    "divide the trunks of each process, leave learn.compile at false, or take a higher model.dtype or a wider "
    "objective.clip"
)


class Watch:
    """Looks at the rows of a run one after the other.

    Args:
        clip: objective.clip, beside which the first log-ratio has to be small.
        before: rows of the metrics of an earlier part of the run.
    """

    def __init__(self, clip: float, before: Sequence[Mapping[str, Any]] = ()):
        self.clip = clip
        self.first: list[Stretch] = []
        self.last: list[Stretch] = []
        self.showing: set[str] = set()
        for row in before:
            self._take(row)
            self.showing |= set(row.get("warnings", ()))

    def look(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Name -> words of what this row of an iteration shows and the one before did not."""
        self._take(row)
        found = self._drift(row)
        if len(self.last) == WINDOW:
            start, now = _mean(self.first), _mean(self.last)
            shown = {name: sign.words for name, sign in SIGNS.items() if sign.shows(start, now)}
            found |= {name: words.format(start=start, now=now) for name, words in shown.items()}
        fresh = {name: words for name, words in found.items() if name not in self.showing}
        self.showing = found.keys() | (self.showing & {DRIFT})  # drift comes and goes, and is told once
        return fresh

    def _take(self, row: Mapping[str, Any]) -> None:
        spreads = [value for value in row.get("reward_std_per_step", ()) if value is not None]
        if row.get("reward_mean") is None or not spreads:
            return
        taken = Stretch(row["reward_mean"], sum(spreads) / len(spreads), row.get("idle_share", 0.0))
        self.last = [*self.last, taken][-WINDOW:]
        if len(self.first) < WINDOW:
            self.first.append(taken)

    def _drift(self, row: Mapping[str, Any]) -> dict[str, str]:
        drift = row.get(f"{DRIFT}_max")
        if drift is None or drift <= self.clip:
            return {}
        return {DRIFT: DRIFT_WORDS.format(drift=drift, clip=self.clip)}


def _mean(stretches: Sequence[Stretch]) -> Stretch:
    count = len(stretches)
    return Stretch(*(sum(getattr(each, name) for each in stretches) / count for name in ("reward", "spread", "idle")))
