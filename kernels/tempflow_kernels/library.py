"""Operator schemas, their fakes, and the backends behind them, chosen by the dispatcher.

| dispatch key | implementation |
|---|---|
| CPU | the C++ twin (`cpu/`) if its library is there, else plain torch (`plain/`) |
| CUDA (also ROCm) | Triton (`gpu/`); without triton an error, never a silent replacement |
| any other device | plain torch |

The environment variable TEMPFLOW_KERNELS_BACKEND = reference | native | triton overrules the choice for CPU and CUDA
(`triton` on CPU tensors works under TRITON_INTERPRET=1 only); it is read once, at import.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix, ops
from .checks import PLAIN
from .cpu import library as native
from .plain.reference import Branches

BACKENDS = {"reference": "plain", "native": "cpu", "triton": "gpu"}
"""The folder of each backend; its operators stand in `ops.py` there."""
DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
"""By device type; other devices are left to the dispatcher."""
BRANCHES = (
    "(Tensor velocity, Tensor velocity_old, Tensor terms, Tensor? key, Tensor? noise, Tensor? velocity_ref, "
    "float kl_coef, "
)
"""The fields of `Branches`; operators whose schema begins with them get one of these instead."""
_LOSS = BRANCHES + "Tensor advantages, float clip_low, float clip_high) -> (Tensor, Tensor, Tensor)"
SCHEMAS = {
    "normal": "(Tensor key, SymInt siblings, SymInt elements) -> Tensor",
    "transition_step": (
        "(Tensor latents, Tensor velocity, Tensor coef, Tensor key, SymInt siblings, Tensor? velocity_uncond, "
        "float guidance) -> (Tensor, Tensor)"
    ),
    "transition_log_prob": "(Tensor next_latents, Tensor latents, Tensor velocity, Tensor coef) -> Tensor",
    "transition_log_prob_gradient": (
        "(Tensor slopes, Tensor next_latents, Tensor latents, Tensor velocity, Tensor coef) -> Tensor"
    ),
    "log_ratio": BRANCHES + "SymInt siblings) -> Tensor",
    "branch_loss": _LOSS,
    "branch_loss_gradient": _LOSS,
    "velocity_gradient": BRANCHES + "Tensor slopes, Tensor scale, str forward_noise='') -> Tensor",
}


def _fp32(like: Tensor, *shape) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _fake_loss(velocity: Tensor, *third) -> tuple[Tensor, Tensor, Tensor]:
    return _fp32(velocity), _fp32(velocity, 7), _fp32(velocity, *third)


FAKES = {
    "normal": lambda key, siblings, elements: _fp32(key, key.shape[0], siblings, elements),
    "transition_step": lambda latents, velocity, coef, key, siblings, uncond, guidance: (
        _fp32(latents, latents.shape[0], siblings, *latents.shape[1:]),
        _fp32(latents, latents.shape[0], siblings),
    ),
    "transition_log_prob": lambda following, latents, velocity, coef: _fp32(latents, *following.shape[:2]),
    "transition_log_prob_gradient": lambda slopes, following, latents, velocity, coef: velocity.new_empty(
        velocity.shape
    ),
    "log_ratio": lambda branches, siblings: _fp32(branches.velocity, branches.velocity.shape[0], siblings),
    "branch_loss": lambda branches, advantages, *_: _fake_loss(branches.velocity, *advantages.shape),
    "branch_loss_gradient": lambda branches, *_: _fake_loss(branches.velocity, *branches.velocity.shape),
    "velocity_gradient": lambda branches, *_: branches.velocity.new_empty(branches.velocity.shape),
}


def _from_schema(name: str, function: Callable) -> Callable:
    """`function` with the arguments of the operator's schema: those of `Branches` one by one."""
    if not SCHEMAS[name].startswith(BRANCHES):
        return function
    shared = len(Branches._fields)
    return lambda *arguments: function(Branches(*arguments[:shared]), *arguments[shared:])


@functools.cache
def implementation(name: str, dispatch_key: str) -> Callable:
    """What computes the operator `name` for a dispatch key; its module is imported now (triton takes its time)."""
    module = importlib.import_module(f".{BACKENDS[CHOSEN[dispatch_key]]}.ops", __package__)
    return _from_schema(name, getattr(module, name))


def _on_first_call(name: str, dispatch_key: str) -> Callable:
    return lambda *arguments: implementation(name, dispatch_key)(*arguments)


def run(name: str, *arguments):
    """The operator `name`, past the dispatcher where nobody else wants to see the call: 5 to 15 us less on the host.

    For calls that need no gradient of their own. The numbers are those of the dispatcher's call.
    """
    if is_watched(arguments):
        return getattr(ops, name)(*arguments)
    dispatch_key = DISPATCH_KEYS.get(arguments[0].device.type)
    function = implementation(name, dispatch_key) if dispatch_key else getattr(ops, name)
    return function(*arguments)


def is_watched(arguments: tuple) -> bool:
    """Whether a call must go through the dispatcher: compilation, tracing, modes, transforms, a profiler, or arguments
    that only look like tensors."""
    return (
        torch.compiler.is_compiling()
        or not PLAIN.issuperset(map(type, arguments))
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


def chosen_backends() -> dict[str, str]:
    """Backend per dispatch key.

    Raises:
        ValueError: TEMPFLOW_KERNELS_BACKEND names no backend.
        RuntimeError: it asks for `native` and the library is not there.
    """
    forced = os.environ.get("TEMPFLOW_KERNELS_BACKEND", "")
    if forced and forced not in BACKENDS:
        raise ValueError(f"TEMPFLOW_KERNELS_BACKEND: found {forced!r}, expected one of {', '.join(BACKENDS)}")
    if forced == "native":
        native.library()
    cpu = forced or ("native" if native.available() else "reference")
    cuda = "reference" if forced == "reference" else "triton"
    return {"CPU": cpu, "CUDA": cuda, "CompositeExplicitAutograd": "reference"}


def register() -> torch.library.Library:
    """Define every operator, its fake and its backends."""
    library = torch.library.Library(NAMESPACE, "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
        torch.library.register_fake(add_op_namespace_prefix(name), _from_schema(name, FAKES[name]), lib=library)
        for dispatch_key in CHOSEN:
            library.impl(name, _on_first_call(name, dispatch_key), dispatch_key)
    return library


NAMESPACE = add_op_namespace_prefix("").removesuffix("::")
CHOSEN = chosen_backends()
LIBRARY = register()
