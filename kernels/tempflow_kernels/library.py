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

from ._ops import add_op_namespace_prefix
from .cpu import library as native
from .plain.reference import Branches

BACKENDS = {"reference": "plain", "native": "cpu", "triton": "gpu"}
"""The folder of each backend; its operators stand in `ops.py` there."""
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
    "transition_log_prob_gradient": lambda slopes, following, latents, velocity, coef: (
        velocity.new_empty(velocity.shape)
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


def _on_first_call(backend: str, name: str) -> Callable:
    """The operator `name` of a backend module that is imported when it is first used (triton takes its time)."""
    found = functools.cache(lambda: getattr(importlib.import_module(f".{BACKENDS[backend]}.ops", __package__), name))
    return lambda *arguments: found()(*arguments)


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
        for dispatch_key, backend in CHOSEN.items():
            library.impl(name, _from_schema(name, _on_first_call(backend, name)), dispatch_key)
    return library


NAMESPACE = add_op_namespace_prefix("").removesuffix("::")
CHOSEN = chosen_backends()
LIBRARY = register()
