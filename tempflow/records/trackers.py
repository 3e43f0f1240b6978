"""Where figures go besides metrics.jsonl."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tempflow.common.errors import BadInput


def flat_numbers(row: dict[str, Any]) -> dict[str, float]:
    """Numbers of a row under one name each: {"phase_seconds": {"tails": 1.0}} becomes phase_seconds/tails."""
    flat = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{key}": number for key, number in value.items()}
        elif isinstance(value, list):
            flat |= {f"{name}/{index}": number for index, number in enumerate(value) if isinstance(number, int | float)}
        elif isinstance(value, int | float):
            flat[name] = value
    return flat


def check_trackers(names: Sequence[str]) -> None:
    """Refuses a tracker whose package is absent.

    Raises:
        BadInput: with the command that installs it.
    """
    if "wandb" in names and importlib.util.find_spec("wandb") is None:
        raise BadInput("run.trackers", "wandb", "is not installed: pip install 'tempflow[wandb]'")


def _tensorboard(folder: Path, run_name: str):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def sink(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return sink


def _wandb(folder: Path, run_name: str):
    import wandb

    run = wandb.init(project="tempflow", name=run_name, dir=str(folder), resume="allow")
    return lambda values, step: run.log(values, step=step)


TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb}
