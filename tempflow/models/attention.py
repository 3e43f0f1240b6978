"""The attention backend of a policy's networks: named by the user, or measured at the run's own shapes.

The names are those of diffusers (`diffusers.models.attention_dispatch`). Trunk, training, reference and merged copy
all use the same backend, and so do all processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _check_attention_backend_requirements,
    attention_backend,
)
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from tempflow.common.capture import CaptureBroken
from tempflow.common.errors import BadInput
from tempflow.common.say import say
from tempflow.common.timing import device_seconds
from tempflow.models.pipeline import PipelinePolicy

CANDIDATES = ("native", "_native_cudnn", "_native_flash", "flash", "_flash_3")
MASKED_CANDIDATES = ("native", "_native_cudnn", "_native_efficient")
"""Those that take a padding mask; the varlen ones do too, but read it from the GPU at every layer."""

FASTER = 0.99
"""What a backend's time must be of native's to be preferred, so that a run begun again chooses the same. Attention is
about a seventh of SD3.5 medium's operations at 512 pixels, so this asks for attention some 7 % faster."""


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


def installed() -> list[str]:
    """Names of the backends whose packages are here; whether one serves a model and device is another matter."""
    found = []
    for name in AttentionBackendName:
        try:
            check_attention(name.value)
        except BadInput:
            continue
        found.append(name.value)
    return found


def set_attention(
    policy: PipelinePolicy, wanted: str, rows: int = 1, slowest: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Sets the backend and says so in `policy.attention`.

    Args:
        rows: of the network call at which backends are compared.
        slowest: the largest of each number over all processes, so that all choose alike; None for one process.
    Raises:
        BadInput: it is not usable with this model, precision and device.
    """
    switch(policy, "native")
    if wanted == "auto" and policy.device.type == "cuda":
        policy.attention = fastest(policy, rows, slowest)
    elif wanted not in ("auto", "native"):
        _explicit(policy, wanted)


def _explicit(policy: PipelinePolicy, wanted: str) -> None:
    case = Case(policy, 1)
    problem = _problem(case, wanted, case.reached())
    if problem:
        raise BadInput("model.attention", wanted, problem)
    policy.attention = wanted


def fastest(
    policy: PipelinePolicy,
    rows: int,
    slowest: Callable[[Tensor], Tensor] | None = None,
    seconds: Callable[[Callable[[], object], torch.device, bool], float] = device_seconds,
) -> str:
    """Switches to the fastest usable backend and tells the times.

    A backend's time is that of a call of `rows` rows without gradient, as in tails and trunk, and of one with its
    backward pass, as in learning.

    Raises:
        BadInput: CUDA broke off a capture, so that this process cannot go on.
    """
    case = Case(policy, rows)
    names = MASKED_CANDIDATES if policy.family.padded_text else CANDIDATES
    times = _times(case, names, seconds)
    times = times if slowest is None else slowest(times)
    totals = times.sum(1)
    best = int(totals.argmin())
    best = best if totals[best] < FASTER * totals[0] else 0
    switch(policy, names[best])
    told = [f"{name} {1000 * a:.1f} + {1000 * b:.1f} ms" for name, (a, b) in zip(names, times.tolist(), strict=True)]
    usable = ", ".join(line for line, total in zip(told, totals.isfinite(), strict=True) if total)
    shape = " x ".join(str(size) for size in (rows, *policy.latent_shape))
    return f"{names[best]} (a call at {shape} + one with its backward pass: {usable}; {case.repeats()})"


def _times(case: Case, names: tuple[str, ...], seconds: Callable[..., float]) -> Tensor:
    """(backends, 2) fp64 seconds of a call and of one with its backward pass; infinite where one is not usable."""
    expected = case.reached()
    usable = ["native", *(name for name in names if name != "native" and not _problem(case, name, expected))]
    alike = [_alike(case, call, usable, seconds) for call in (case.forward, case.backward)]
    return torch.tensor([[times.get(name, torch.inf) for times in alike] for name in names], dtype=torch.float64)


def _alike(case: Case, call: Callable[[], object], names: list[str], seconds: Callable[..., float]) -> dict[str, float]:
    """Seconds by backend, timed in one way: all captured, or where that fails for one of them none."""
    try:
        return {name: _seconds(case, call, name, seconds, True) for name in names}
    except CaptureBroken as error:
        hint = (f"CUDA broke off the capture of a network call ({_reason(error)}), after which this process cannot go "
                "on; name a backend, such as native")  # fmt: skip
        raise BadInput("model.attention", "auto", hint) from error
    except RuntimeError as error:  # too little memory for the graph too
        say(f"model.attention=auto: timed with their launches, for calls cannot be captured ({_reason(error)})")
    return {name: _seconds(case, call, name, seconds, False) for name in names}


def _seconds(case: Case, call: Callable[[], object], name: str, seconds: Callable[..., float], captured: bool) -> float:
    """Infinite where another backend than native needs more memory than there is, other than for its graph."""
    switch(case.policy, name)
    try:
        return seconds(call, case.policy.device, captured)
    except torch.OutOfMemoryError:
        if captured or name == "native":
            raise
        return torch.inf


def _problem(case: Case, name: str, expected: set[str]) -> str:
    """Why a backend, to which the policy is switched, cannot be used; empty if it can."""
    try:
        switch(case.policy, name)
        reached = case.reached()
    except (RuntimeError, ValueError, NotImplementedError, TypeError, ImportError, OSError) as error:
        return f"not usable here ({_reason(error)})"
    return "" if reached == expected else "it gives no gradient; choose one that can be trained through"


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


class Case:
    """A network call of the run's own shape, by which backends are tried and compared."""

    def __init__(self, policy: PipelinePolicy, rows: int):
        self.policy = policy
        numbers = torch.Generator().manual_seed(0)
        latents = torch.randn(rows, *policy.latent_shape, generator=numbers).to(policy.device)
        sigma = torch.full((rows,), 0.5, device=policy.device)
        self.arguments = latents, sigma, policy.encode([policy.family.blank] * rows)

    @torch.no_grad()
    def forward(self) -> Tensor:
        return self.policy.velocity(*self.arguments)

    @torch.enable_grad()
    def backward(self) -> tuple[Tensor | None, ...]:
        """Gradients of the trained parameters; None where none reaches."""
        total = self.policy.velocity(*self.arguments).sum()
        return torch.autograd.grad(total, list(self.policy.trainable().values()), allow_unused=True)

    def reached(self) -> set[str]:
        """Names of the parameters that a gradient reaches."""
        names = self.policy.trainable()
        return {name for name, gradient in zip(names, self.backward(), strict=True) if gradient is not None}

    def repeats(self) -> str:
        """Whether the call with gradient repeats the one without; if not, the first log-ratios will not be 0."""
        with torch.enable_grad():
            learnt = self.policy.velocity(*self.arguments).detach()
        difference = (learnt - self.forward()).abs().max().item()
        return f"with gradient it differs by {difference:.1e}" if difference else "equal with and without gradient"


def switch(policy: PipelinePolicy, name: str) -> None:
    """Lets every attention layer of the policy use a backend."""
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
