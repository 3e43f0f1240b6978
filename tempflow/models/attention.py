"""The attention backend of a policy's networks: named by the user, or measured at the run's own shapes.

The names are those of diffusers (`diffusers.models.attention_dispatch`). Trunk, training, reference and merged copy
all use the same backend.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _check_attention_backend_requirements,
    attention_backend,
)
from diffusers.utils import logging as diffusers_logging
from torch import nn

from tempflow.common.errors import BadInput
from tempflow.models.pipeline import PipelinePolicy

CANDIDATES = ("_native_cudnn", "_native_flash", "flash", "_flash_3")
MASKED_CANDIDATES = ("_native_cudnn", "_native_efficient")
"""Those that take a padding mask; the varlen ones do too, but read it from the GPU at every layer."""

FASTER = 0.97
"""What a backend's time must be of native's to be preferred, so that processes with equal GPUs agree."""

REPEATS = 3


def check_attention(wanted: str) -> None:
    """Whether there is such a backend and what it needs is installed.

    Raises:
        BadInput: if not, naming what to install.
    """
    known = sorted(name.value for name in AttentionBackendName)
    if wanted not in ("auto", *known):
        raise BadInput("model.attention", wanted, f"no such backend; choose auto or one of {', '.join(known)}")
    if wanted != "auto":
        try:
            _check_attention_backend_requirements(AttentionBackendName(wanted))
        except RuntimeError as error:
            raise BadInput("model.attention", wanted, f"not installed ({error})") from error


def set_attention(policy: PipelinePolicy, wanted: str) -> None:
    """Sets the backend and says so in `policy.attention`.

    Raises:
        BadInput: it is not usable with this model, precision and device.
    """
    if not _switchable(policy.network.module):
        if wanted not in ("auto", "native"):
            raise BadInput("model.attention", wanted, "this model's layers know only native in diffusers")
        return
    _switch(policy, "native")
    if wanted == "auto" and policy.device.type == "cuda":
        policy.attention = _measured(policy)
    elif wanted not in ("auto", "native"):
        _explicit(policy, wanted)


def _explicit(policy: PipelinePolicy, wanted: str) -> None:
    expected = _with_gradient(policy)
    problem = _problem(policy, wanted, expected)
    if problem:
        raise BadInput("model.attention", wanted, problem)
    policy.attention = wanted


def _measured(policy: PipelinePolicy) -> str:
    """Switches to the fastest usable backend and tells the times."""
    expected, best = _with_gradient(policy), "native"
    times = {"native": _seconds(policy)}
    for name in MASKED_CANDIDATES if policy.family.padded_text else CANDIDATES:
        if not _problem(policy, name, expected):
            times[name] = _seconds(policy)
            if times[name] < FASTER * times["native"] and times[name] < times[best]:
                best = name
    _switch(policy, best)
    timings = ", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in times.items())
    return f"{best} (one row: {timings})"


def _problem(policy: PipelinePolicy, name: str, expected: set[str]) -> str:
    """Why a backend, to which the policy is switched, cannot be used; empty if it can."""
    try:
        _switch(policy, name)
        reached = _with_gradient(policy)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, NotImplementedError, TypeError, ImportError, OSError) as error:
        return f"not usable here ({' '.join(str(error).split())[:200]})"
    return "" if reached == expected else "it gives no gradient; choose one that can be trained through"


def _with_gradient(policy: PipelinePolicy) -> set[str]:
    """Names of the parameters that a gradient reaches in one row of the run's own shape."""
    parameters = policy.trainable()
    with torch.enable_grad():
        policy.velocity(*_row(policy)).sum().backward()
    reached = {name for name, parameter in parameters.items() if parameter.grad is not None}
    for parameter in parameters.values():
        parameter.grad = None
    return reached


@torch.no_grad()
def _seconds(policy: PipelinePolicy) -> float:
    """Shortest of a few calls of one row, after one to warm up."""
    arguments, times = _row(policy), []
    policy.velocity(*arguments).sum().item()
    for _ in range(REPEATS):
        start = time.perf_counter()
        policy.velocity(*arguments).sum().item()  # reading a number waits for the device
        times.append(time.perf_counter() - start)
    return min(times)


def _row(policy: PipelinePolicy) -> tuple:
    """Arguments of `velocity`."""
    latents = torch.zeros(1, *policy.latent_shape, device=policy.device)
    return latents, torch.full((1,), 0.5, device=policy.device), policy.encode([policy.family.blank])


def _switchable(module: nn.Module) -> bool:
    return any(hasattr(getattr(part, "processor", None), "_attention_backend") for part in module.modules())


def _switch(policy: PipelinePolicy, name: str) -> None:
    network = policy.network
    with _quiet(), attention_backend("native"):  # set_attention_backend also sets the default of everything else
        for module in (network.module, network.frozen):
            if module is not None:
                module.set_attention_backend(name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' warning that backends are experimental."""
    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(before)
