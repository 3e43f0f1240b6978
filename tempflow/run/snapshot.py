"""All that a checkpoint holds, in main memory: taken from a run, compared with another, and put back.

The random draws need no state: they are functions of the run seed and the iteration (`tempflow.common.draws`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from tempflow.common.tensors import gather
from tempflow.learn.optimizers import load_state
from tempflow.learn.stepper import Stepper
from tempflow.parallel.shards import put

PARTS = ("parameters", "average", "optimizer")
"""names of the groups of tensors, each a file of its own"""


class Unfit(ValueError):
    """What a snapshot cannot be put back for, in words."""


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
    metrics_bytes: int | None = None
    """length of metrics.jsonl, of which a resumed run keeps no more"""
    gold: float | None = None
    """the gold score of these averaged parameters, the first if there are several, where they were evaluated"""


@dataclass(frozen=True)
class State:
    """What of a run is no tensor."""

    progress: Progress
    numbers: dict[str, int | float]
    """those of the optimizer's state, by parameter and name"""
    optimizer_steps: int
    loss_scale: dict[str, float] | None
    """in fp16"""
    settings: dict[str, Any]
    """section -> field -> value, for the reader; a resumed run compares config.yaml"""


@dataclass(frozen=True)
class Snapshot:
    """A run after an iteration. Example: parameters `a.lora_A.weight`, optimizer `0.exp_avg`."""

    state: State
    tensors: dict[str, dict[str, Tensor]]
    """PARTS -> name -> full tensor in main memory"""

    @property
    def progress(self) -> Progress:
        return self.state.progress


def take(progress: Progress, stepper: Stepper, settings: Mapping[str, Any], keep: bool = True) -> Snapshot:
    """Copies of everything, which training may go on beside.

    Args:
        keep: False in processes that only take part in gathering what is shared out; they get no tensors.
    """
    leaves = dict(_leaves(stepper.optimizer.state_dict()["state"]))
    tensors = {name: value for name, value in leaves.items() if isinstance(value, Tensor)}
    numbers = {name: value for name, value in leaves.items() if name not in tensors}
    groups = (stepper.parameters, stepper.average.average, tensors)
    found = {part: gather(group, keep) for part, group in zip(PARTS, groups, strict=True)}
    scale = None if stepper.scale is None else stepper.scale.state()
    return Snapshot(State(progress, numbers, stepper.average.optimizer_steps, scale, dict(settings)), found)


def check(snapshot: Snapshot, stepper: Stepper) -> None:
    """Compares names, shapes and dtypes with a run's, and looks for what is no number.

    Raises:
        Unfit: it is another model's, or damaged.
    """
    check_numbers(snapshot)
    parameters, average, optimizer = (snapshot.tensors[part] for part in PARTS)
    compare(parameters, stepper.parameters)
    compare(average, stepper.average.average)
    _compare_optimizer(optimizer, list(stepper.parameters.values()))
    state = snapshot.state
    if any(isinstance(value, bool) or value != value for value in state.numbers.values()):
        raise Unfit("the optimizer's numbers are none")
    if state.optimizer_steps < 0 or state.progress.iteration < 1:
        raise Unfit("it counts fewer than no steps")
    if stepper.scale is not None and not {"scale", "clean"} <= (state.loss_scale or {}).keys():
        raise Unfit("it has no loss scale")


def check_numbers(snapshot: Snapshot) -> None:
    """
    Raises:
        Unfit: naming the first tensor that holds NaN or an infinite value.
    """
    for part, tensors in snapshot.tensors.items():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise Unfit(f"{name} of its {part} holds values that are not finite")


def put_back(snapshot: Snapshot, stepper: Stepper) -> None:
    """Loads a snapshot that `check` has accepted into a run."""
    parameters, average, optimizer = (snapshot.tensors[part] for part in PARTS)
    _copy(parameters, stepper.parameters)
    _copy(average, stepper.average.average)
    groups = stepper.optimizer.state_dict()["param_groups"]  # the settings, which are a run's own
    load_state(stepper.optimizer, {"state": _nested(optimizer | snapshot.state.numbers), "param_groups": groups})
    stepper.average.optimizer_steps = snapshot.state.optimizer_steps
    if stepper.scale is not None:
        stepper.scale.load(snapshot.state.loss_scale)


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor] | dict[str, Parameter]) -> None:
    for name, tensor in target.items():
        put(tensor, source[name])


def compare(found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Names, shapes and dtypes of parameters with a model's.

    Raises:
        Unfit: naming the first that differs.
    """
    if found.keys() != own.keys():
        example = min(found.keys() ^ own.keys())
        raise Unfit(f"{len(found.keys() ^ own.keys())} parameters differ from the model's, among them {example}")
    for name, tensor in own.items():
        there, here = (tuple(found[name].shape), found[name].dtype), (tuple(tensor.shape), tensor.dtype)
        if there != here:
            raise Unfit(f"{name} is {there[1]} of shape {there[0]}, the model's {here[1]} of {here[0]}")


def _compare_optimizer(found: dict[str, Tensor], parameters: list[Parameter]) -> None:
    """Moments have their parameter's shape; scalars, and the scales and tables of 8-bit moments, have their own."""
    for name, tensor in found.items():
        place, kind = name.partition(".")[0], name.rpartition(".")[2]
        if not place.isdigit() or int(place) >= len(parameters):
            raise Unfit(f"the optimizer's {name} belongs to no parameter")
        own = parameters[int(place)].shape
        if tensor.dim() and tensor.shape != own and not kind.startswith(("qmap", "absmax")):
            raise Unfit(f"the optimizer's {name} has shape {tuple(tensor.shape)}, its parameter {tuple(own)}")


def _leaves(values: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`5.outer.inner` names a nested value."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _nested(leaves: Mapping[str, Any]) -> dict[int, dict]:
    state: dict[int, dict] = {}
    for key, value in leaves.items():
        index, *path, name = key.split(".")
        place = state.setdefault(int(index), {})
        for part in path:
            place = place.setdefault(part, {})
        place[name] = value
    return state
