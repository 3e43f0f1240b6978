"""Checkpoints that restore everything: parameters, optimizer, moving average, iteration. Safetensors and JSON only.

The random draws need no state: they are functions of the run seed and the iteration (`tempflow.draws`).
Deviation: the released code saves adapters only and its resume cannot find them.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter

from tempflow.errors import BadInput
from tempflow.optim import MovingAverage


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    iteration: int = 0
    """iterations done"""
    seconds: float = 0.0
    """wall-clock time of the loop"""
    rollouts: int = 0
    """branches explored"""
    owed: dict[str, Any] = field(default_factory=dict)
    """metrics of the last iteration, not written yet because its evaluation failed; else empty"""


def save(
    folder: Path,
    progress: Progress,
    parameters: dict[str, Parameter],
    optimizer: torch.optim.Optimizer,
    average: MovingAverage,
    keep: int,
) -> Path:
    """Writes `folder/step_N`, complete or not at all, and drops all but the newest `keep`."""
    target = folder / f"step_{progress.iteration:06d}"
    partial = folder / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors, plain = _flatten_optimizer(optimizer.state_dict())
    save_file({name: p.detach().contiguous() for name, p in parameters.items()}, partial / "parameters.safetensors")
    save_file({name: t.contiguous() for name, t in average.average.items()}, partial / "average.safetensors")
    save_file(tensors, partial / "optimizer.safetensors")
    state = {"progress": asdict(progress), "optimizer": plain, "optimizer_steps": average.optimizer_steps}
    (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step_*") if (path / "state.json").is_file())


def restore(
    folder: Path, parameters: dict[str, Parameter], optimizer: torch.optim.Optimizer, average: MovingAverage
) -> Progress:
    """Loads the newest checkpoint in `folder` into its arguments; a folder without one leaves a run at its start.

    Raises:
        BadInput: the checkpoint does not fit the model.
    """
    found = checkpoints(folder)
    if not found:
        return Progress()
    newest = found[-1]
    try:
        state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
        _copy(load_file(newest / "parameters.safetensors"), parameters)
        _copy(load_file(newest / "average.safetensors"), average.average)
        optimizer.load_state_dict(_unflatten_optimizer(load_file(newest / "optimizer.safetensors"), state["optimizer"]))
        average.optimizer_steps = state["optimizer_steps"]
        return Progress(**state["progress"])
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        mend = f"the checkpoint does not load ({error}); remove it to use an older one"
        raise BadInput("run.resume", newest, mend) from error


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor] | dict[str, Parameter]) -> None:
    if source.keys() != target.keys():
        raise KeyError(f"{len(source.keys() ^ target.keys())} parameters differ from the model's")
    for name, tensor in target.items():
        if source[name].shape != tensor.shape:
            raise ValueError(f"{name} has shape {tuple(source[name].shape)}, the model's has {tuple(tensor.shape)}")
    for name, tensor in target.items():
        tensor.copy_(source[name])


def _flatten_optimizer(state: dict) -> tuple[dict[str, Tensor], dict]:
    """An optimizer's state_dict as named tensors and JSON values."""
    tensors, numbers = {}, {}
    for index, values in state["state"].items():
        for name, value in values.items():
            (tensors if isinstance(value, Tensor) else numbers)[f"{index}.{name}"] = value
    return {key: tensor.contiguous() for key, tensor in tensors.items()}, {
        "numbers": numbers,
        "param_groups": state["param_groups"],
    }


def _unflatten_optimizer(tensors: dict[str, Tensor], plain: dict) -> dict:
    state: dict[int, dict] = {}
    for key, value in (tensors | plain["numbers"]).items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": plain["param_groups"]}
