"""The optimizer of the trained parameters, what its state weighs, and the parameters' moving average.

bitsandbytes (https://github.com/bitsandbytes-foundation/bitsandbytes) is imported only for the optimizers that are its.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from tempflow.common.errors import BadInput
from tempflow.common.tensors import own_share
from tempflow.parallel.shards import like
from tempflow.settings.fields import LearnConfig


@dataclass(frozen=True)
class OptimizerKind:
    """Which class serves a name of `learn.optimizer`, and how it holds the two moments of AdamW."""

    module: str
    name: str
    eight_bit: bool = False
    paged: bool = False
    """the state lies in unified memory, from which the driver moves pages to the host when the GPU is full"""
    options: tuple[tuple[str, Any], ...] = ()


OPTIMIZERS = {
    "adamw": OptimizerKind("torch.optim", "AdamW", options=(("fused", True),)),
    "adamw8bit": OptimizerKind("bitsandbytes.optim", "AdamW8bit", eight_bit=True),
    "paged_adamw": OptimizerKind("bitsandbytes.optim", "PagedAdamW32bit", paged=True),
    "paged_adamw8bit": OptimizerKind("bitsandbytes.optim", "PagedAdamW8bit", eight_bit=True, paged=True),
}
BLOCK = 256
"""8-bit moments share one fp32 scale per so many elements."""


def make_optimizer(learn: LearnConfig, parameters: Sequence[Parameter]) -> torch.optim.Optimizer:
    """The optimizer that `learn` names, with its settings.

    Raises:
        BadInput: bitsandbytes is absent, or has no such step for the device the parameters are on.
    """
    kind = OPTIMIZERS[learn.optimizer]
    if importlib.util.find_spec(kind.module.partition(".")[0]) is None:
        raise BadInput("learn.optimizer", learn.optimizer, "bitsandbytes is missing: pip install 'tempflow[gpu]'")
    make = getattr(importlib.import_module(kind.module), kind.name)
    options = dict(kind.options) | ({"min_8bit_size": learn.min_8bit_size} if kind.eight_bit else {})
    check_device(learn.optimizer, parameters[0].device.type)
    return make(
        parameters, lr=learn.lr, betas=learn.betas, eps=learn.eps, weight_decay=learn.weight_decay, **options
    )


def check_device(name: str, device: str) -> None:
    """Refuses a device on which the optimizer `name`, whose library has been imported, cannot step."""
    kind = OPTIMIZERS[name]
    if kind.paged and device == "cpu":
        hint = "pages move between GPU and host; on a CPU use learn.optimizer=adamw or adamw8bit"
        raise BadInput("learn.optimizer", name, hint)
    operator = "bitsandbytes::optimizer_update_8bit_blockwise"
    if kind.eight_bit and not torch._C._dispatch_has_kernel_for_dispatch_key(operator, device.upper()):
        hint = f"the installed bitsandbytes has no 8-bit step for {device}; upgrade it or use learn.optimizer=adamw"
        raise BadInput("learn.optimizer", name, hint)


def estimated_state_bytes(learn: LearnConfig, sizes: Iterable[int]) -> int:
    """Bytes that the optimizer of `learn` holds after its first step for parameters of `sizes` elements.

    AdamW: two fp32 moments. In 8 bits: two bytes an element and two fp32 scales a block; small tensors as before.
    """
    smallest = learn.min_8bit_size if OPTIMIZERS[learn.optimizer].eight_bit else float("inf")
    return sum(8 * size if size < smallest else 2 * size + 8 * -(-size // BLOCK) for size in sizes)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the state tensors of an optimizer in this process, those shared between parameters counted once."""
    states = optimizer.state.values()
    tensors = [own_share(value) for state in states for value in state.values() if isinstance(value, Tensor)]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`optimizer.load_state_dict` of full tensors; a paged optimizer's then lie in pages again, a shared-out one's in
    shares."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own = {place: {name: like(parameters[int(place)], value) if isinstance(value, Tensor) else value
                   for name, value in values.items()} for place, values in state["state"].items()}  # fmt: skip
    optimizer.load_state_dict({**state, "state": own})
    if not getattr(optimizer, "is_paged", False):
        return
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            _page(optimizer, group, parameter, number, place)


def _page(optimizer: Any, group: dict, parameter: Parameter, number: int, place: int) -> None:
    """Moves what was loaded for a parameter into buffers of the optimizer's own making."""
    loaded = optimizer.state.pop(parameter, {})
    if not loaded:
        return
    optimizer.init_state(group, parameter, number, place)
    own = optimizer.state[parameter]
    for name, value in loaded.items():
        if isinstance(value, Tensor):
            own[name].copy_(value)
        else:
            own[name] = value


def set_learning_rate(optimizer: torch.optim.Optimizer, learn: LearnConfig, iteration: int) -> None:
    """The learning rate of an iteration, a function of its number alone, so that resume needs no state for it."""
    left = {"constant": 1.0, "linear": 1 - iteration / learn.iterations}[learn.lr_schedule]
    for group in optimizer.param_groups:
        group["lr"] = learn.lr * left


