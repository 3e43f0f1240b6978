"""Is the reward being hacked? Held-out scores of each evaluation are kept by prompt and compared in pairs.

A gold score has fallen, while the reward has risen, if both have changed by more than `threshold` standard errors since
the evaluation at which this gold score was best. The pairs share prompt and initial noise, so the standard error is
that of their mean difference: it knows no unit, whatever the scorer, and a fall that chance explains does not count,
however few the prompts. The best evaluation is chosen after the fact, which favours a fall; hence 3, not 2, by default.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tempflow.common.files import write_atomically

REWARD = "reward_test"
"""The name of the optimised reward among the scores."""

Scores = dict[str, Tensor]
"""scorer -> scores by prompt, (n,) fp32; NaN where it has no opinion."""


def falls(history: Sequence[Scores], now: Scores, golds: Sequence[str], threshold: float) -> dict[str, float]:
    """The gold scores that have fallen while the reward rose, and by how much.

    Args:
        history: the evaluations before; `now`: the last one.
        golds: the names to look at.
        threshold: in standard errors of the mean difference.
    """
    found = {}
    for name in golds:
        known = [past for past in history if name in past and REWARD in past and len(past[name]) == len(now[name])]
        if not known:
            continue
        best = max(known, key=lambda past: past[name].nanmean().nan_to_num(-math.inf).item())
        fallen, risen = paired_change(best[name], now[name]), paired_change(best[REWARD], now[REWARD])
        if -fallen[0] > threshold * fallen[1] and risen[0] > threshold * risen[1]:
            found[name] = round(-fallen[0], 6)
    return found


def paired_change(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Mean difference over the prompts that both know, and its standard error; (0, 0) for fewer than two."""
    difference = (after - before).double()
    difference = difference[~difference.isnan()]
    if len(difference) < 2:
        return 0.0, 0.0
    return difference.mean().item(), difference.std().item() / math.sqrt(len(difference))


def keep_scores(folder: Path, step: int, scores: Mapping[str, Tensor]) -> None:
    """Writes `scores/step_N.json`: scorer -> scores by held-out prompt, null where it has no opinion."""
    folder = folder / "scores"
    folder.mkdir(exist_ok=True)
    plain = {name: [None if math.isnan(value) else value for value in row.tolist()] for name, row in scores.items()}
    write_atomically(folder / f"step_{step:06d}.json", json.dumps(plain).encode())


def read_scores(folder: Path, before: int) -> list[Scores]:
    """The scores of the evaluations at steps under `before`, oldest first."""
    files = sorted((folder / "scores").glob("step_*.json"))
    rows = [json.loads(file.read_text(encoding="utf-8")) for file in files if int(file.stem[5:]) < before]
    return [
        {name: torch.tensor([math.nan if value is None else value for value in row]) for name, row in row.items()}
        for row in rows
    ]
