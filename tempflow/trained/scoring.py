"""Scores of a model's pictures: network calls are shared out over processes, and every process gets all scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tempflow.common.errors import BadInput
from tempflow.common.say import say
from tempflow.credit.decoding import check_lost
from tempflow.parallel.ranks import Ranks
from tempflow.rewards.panel import Panel, load_panels
from tempflow.settings.fields import Config
from tempflow.trained.sampling import Sampler

TOTAL = "reward"
"""The name of the weighted sum of several rewards."""


@dataclass(frozen=True)
class Jury:
    """The scorers of an evaluation: rewards, and golds that nobody optimised."""

    rewards: Panel
    gold: Panel

    @property
    def roles(self) -> dict[str, str]:
        """Name of each row of scores -> reward or gold."""
        total = {TOTAL: "reward"} if len(self.rewards.scorers) > 1 and self.rewards.weights.count_nonzero() else {}
        golds = {f"gold_{name}" if name in self.rewards.scorers else name: "gold" for name in self.gold.scorers}
        return total | dict.fromkeys(self.rewards.scorers, "reward") | golds

    def __call__(self, images: Tensor, prompts: Sequence[Any]) -> Tensor:
        """(B, 3, H, W) uint8 images -> (rows of `roles`, B) fp32; NaN where a scorer has no opinion."""
        rewards = self.rewards(images, prompts)
        total = self.rewards.total(rewards)[None] if TOTAL in self.roles else rewards[:0]
        return torch.cat((total, rewards, self.gold(images, prompts)))


def load_jury(config: Config, asked: Sequence[str], options: dict[str, dict[str, Any]], device: torch.device) -> Jury:
    """The scorers asked for, or those of the settings where none are.

    Args:
        asked: names as for reward.name. options: name -> options of that scorer, on top of the settings'.
    Raises:
        BadInput: no such scorer, or one that cannot be made.
    """
    reward = config.reward
    if asked:
        kept = {name: value for name, value in reward.options.items() if name in asked}
        merged = {name: {**kept.get(name, {}), **options.get(name, {})} for name in asked}
        given = {name: value for name, value in merged.items() if value}
        reward = replace(reward, name=dict.fromkeys(asked, 0.0), gold=None, options=given)
    with _called("reward.name", "--reward") if asked else nullcontext():
        return Jury(*load_panels(reward, reward.rows, device))


@contextmanager
def _called(field: str, option: str) -> Iterator[None]:
    """Within this context what is said of a field is said of the option that stands for it."""
    try:
        yield
    except BadInput as error:
        if error.field != field:
            raise
        raise BadInput(option, error.value, error.hint) from error


class Patient:
    """A jury whose failure is told at the end: until then the other processes may wait for this one's network calls."""

    def __init__(self, jury: Jury):
        self.jury = jury
        self.failure: Exception | None = None

    def __call__(self, images: Tensor, prompts: Sequence[Any]) -> Tensor:
        """As the jury; NaN once it has failed."""
        if self.failure is None:
            try:
                return self.jury(images, prompts)
            except Exception as failure:
                self.failure = failure
        return torch.full((len(self.jury.roles), len(images)), torch.nan)

    def settle(self) -> None:
        """Raises what the jury raised."""
        if self.failure is not None:
            raise self.failure


def score(sampler: Sampler, jury: Jury, ranks: Ranks, shown: Callable[[int], Any]) -> Tensor:
    """(rows of `jury.roles`, P) scores of all pictures, the same on all processes; NaN where there is no opinion.

    Args:
        shown: told of each network call, how many pictures it made.
    Raises:
        BadInput: a scorer refuses or breaks, on any process.
        Halted: all pictures are NaN.
    """
    calls = sampler.places.calls
    padded = -(-len(calls) // ranks.size) * ranks.size  # all make as many, where a network call is one of all
    most = max(call.stop - call.start for call in calls)
    judge = jury if ranks.size == 1 else Patient(jury)

    def work() -> tuple[Tensor, Tensor]:
        tables, counts = [], torch.zeros(3, dtype=torch.int64)
        for place in ranks.share(padded):
            call = calls[min(place, len(calls) - 1)]
            decoded = sampler(call)
            table = judge(decoded.images, sampler.prompts_of(call)).masked_fill(decoded.lost, torch.nan)
            tables.append(torch.nn.functional.pad(table, (0, most - table.shape[1]), value=torch.nan))
            if place < len(calls):
                counts += decoded.counts()
            shown(table.shape[1])
        if isinstance(judge, Patient):
            judge.settle()
        return torch.stack(tables), counts

    tables, counts = ranks.agree(work)
    lost = check_lost(ranks.gather(counts[None], 0), "of the evaluation", strict=False)
    if lost:
        say(f"warning: {sum(lost.values())} pictures came out as NaN or infinity and have no scores")
    gathered = ranks.gather(tables, 0)
    parts = [table[:, : call.stop - call.start] for table, call in zip(gathered, calls, strict=False)]
    return torch.cat(parts, 1)
