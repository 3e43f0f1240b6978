"""Checkpoints that restore everything: parameters, optimizer, moving average, iteration. Safetensors and JSON only.

The random draws need no state: they are functions of the run seed and the iteration (`tempflow.common.draws`).
Deviation: the released code saves adapters only and its resume cannot find them.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter

from tempflow.common.errors import BadInput
from tempflow.common.tensors import gather, own_share
from tempflow.learn.optimizers import load_state
from tempflow.learn.stepper import Stepper
from tempflow.parallel.shards import put


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    iteration: int = 0
    """iterations done"""
    seconds: float = 0.0
    """wall-clock time of the loop"""
    evaluating: float = 0.0
    """how much of it went into evaluations"""
    rollouts: int = 0
    """branches explored"""
    network_rows: int = 0
    """rows of the network, evaluations apart"""
    unevaluated: bool = False
    """the evaluation that may be due after the last iteration has not been made, since a scorer failed"""
    tail_rows: int | None = None
    """branches that travel together, chosen at the start; a resumed run keeps them, so that rounding stays the same"""
    noise: str | None = None
    """how its branches' noise was drawn, exact or fast"""


def save(folder: Path, progress: Progress, stepper: Stepper, keep: int, write: bool = True) -> Path:
    """Writes `folder/step_N`, complete or not at all, and drops all but the newest `keep`.

    Args:
        write: parameters that are shared out are gathered by all processes, and written by the one that has it true.
    """
    target = folder / f"step_{progress.iteration:06d}"
    average, scale = stepper.average, stepper.scale
    tensors, plain = _flatten_optimizer(stepper.optimizer.state_dict())
    files = {name: gather(found, write) for name, found in (
        ("parameters", stepper.parameters), ("average", average.average), ("optimizer", tensors))}  # fmt: skip
    if not write:
        return target
    partial = folder / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, found in files.items():
        save_file(found, partial / f"{name}.safetensors")
    state = {"progress": asdict(progress), "optimizer": plain, "optimizer_steps": average.optimizer_steps,
             "loss_scale": None if scale is None else scale.state()}  # fmt: skip
    (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step_*") if (path / "state.json").is_file())


def restore(folder: Path, stepper: Stepper) -> Progress:
    """Loads the newest checkpoint in `folder` into `stepper`; a folder without one leaves a run at its start.

    Raises:
        BadInput: the checkpoint does not fit the model.
    """
    found = checkpoints(folder)
    if not found:
        return Progress()
    newest = found[-1]
    try:
        state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
        _copy(load_file(newest / "parameters.safetensors"), stepper.parameters)
        _copy(load_file(newest / "average.safetensors"), stepper.average.average)
        saved = _unflatten_optimizer(load_file(newest / "optimizer.safetensors"), state["optimizer"])
        load_state(stepper.optimizer, saved)
        stepper.average.optimizer_steps = state["optimizer_steps"]
        if stepper.scale is not None and state.get("loss_scale"):
            stepper.scale.load(state["loss_scale"])
        return Progress(**state["progress"])
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        hint = f"the checkpoint does not load ({error}); remove it to use an older one"
        raise BadInput("run.resume", newest, hint) from error


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor] | dict[str, Parameter]) -> None:
    if source.keys() != target.keys():
        raise KeyError(f"{len(source.keys() ^ target.keys())} parameters differ from the model's")
    for name, tensor in target.items():
        if source[name].shape != tensor.shape:
            raise ValueError(f"{name} has shape {tuple(source[name].shape)}, the model's has {tuple(tensor.shape)}")
    for name, tensor in target.items():
        put(tensor, source[name])


def _flatten_optimizer(state: dict) -> tuple[dict[str, Tensor], dict]:
    """An optimizer's state_dict as named tensors and JSON values; `5.outer.inner` names a nested value.

    A tensor that several parameters share (bitsandbytes' quantisation maps) is written for each.
    """
    leaves = dict(_leaves(state["state"]))
    tensors = {key: value for key, value in leaves.items() if isinstance(value, Tensor)}
    owners = Counter(own_share(tensor).data_ptr() for tensor in tensors.values())
    apart = {key: t.clone() if owners[own_share(t).data_ptr()] > 1 else t for key, t in tensors.items()}
    numbers = {key: value for key, value in leaves.items() if key not in tensors}
    return apart, {"numbers": numbers, "param_groups": state["param_groups"]}


def _leaves(values: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _unflatten_optimizer(tensors: dict[str, Tensor], plain: dict) -> dict:
    state: dict[int, dict] = {}
    for key, value in (tensors | plain["numbers"]).items():
        index, *path, name = key.split(".")
        place = state.setdefault(int(index), {})
        for part in path:
            place = place.setdefault(part, {})
        place[name] = value
    return {"state": state, "param_groups": plain["param_groups"]}
