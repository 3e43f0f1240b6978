"""Argument checks of the public operators. Every message names the argument, what was found and what was expected.

Checks read shapes, dtypes and devices only, so they run once for each combination of these (`Checked`). The one check
of values (std >= 0) runs in every call, where it costs no device synchronisation: on CPU tensors outside of compiled
code. On a GPU a negative std gives NaN instead of a number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PRECISE = (torch.float32, torch.float64)
"""Of tables of a few numbers per row; float64 is for the oracle."""

PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), int, float, str))
"""Types of arguments that stand for no more than they say; not of fake tensors, symbolic sizes and other subclasses."""


def signature(arguments: Sequence) -> tuple | None:
    """All that checks without values depend on; None where an argument is not of a plain type.

    Numbers stand beside their types, because True == 1 == 1.0.
    """
    if not PLAIN.issuperset(map(type, arguments)):
        return None
    parts: list = [torch.is_grad_enabled()]
    for value in arguments:
        if isinstance(value, Tensor):
            parts += value.shape, value.dtype, value.device, value.requires_grad
        else:
            parts += type(value), value
    return tuple(parts)


class Checked:
    """A function of arguments that raises for wrong ones, run once per signature; what it returns is kept.

    Used as a decorator. Mistakes are not kept, nor is anything in compiled code, which runs its checks once anyway.
    """

    LIMIT = 1024
    """Signatures that are kept; beyond that all are found anew."""

    def __init__(self, function: Callable):
        self.function, self.answers = function, {}

    def __call__(self, *arguments):
        if torch.compiler.is_compiling():
            return self.function(*arguments)
        key = signature(arguments)
        answer = self.answers.get(key)
        return self._first(key, arguments) if answer is None else answer

    def _first(self, key: tuple | None, arguments: Sequence):
        answer = self.function(*arguments)
        if len(self.answers) >= self.LIMIT:
            self.answers.clear()
        if key is not None:
            self.answers[key] = answer
        return answer


def expect(condition: bool, argument: str, found: object, expected: str) -> None:
    """Raise a ValueError that names the argument, unless the condition holds."""
    if not condition:
        raise ValueError(f"{argument}: found {found}, expected {expected}")


def check_tensor(name: str, value: object, shape: Sequence[int], device: torch.device, dtypes=FLOATS) -> None:
    """Shape, dtype and device of one tensor argument. Messages are formatted only when there is something to say."""
    shape = tuple(shape)
    if isinstance(value, Tensor) and value.shape == shape and value.dtype in dtypes and value.device == device:
        return
    expect(isinstance(value, Tensor), name, type(value).__name__, f"a tensor of shape {shape}")
    expect(value.shape == shape, name, f"shape {tuple(value.shape)}", f"shape {shape}")
    expect(value.dtype in dtypes, name, value.dtype, " or ".join(str(dtype) for dtype in dtypes))
    expect(value.device == device, name, f"device {value.device}", f"device {device}, that of the first argument")


def check_rows(name: str, value: object) -> None:
    """A tensor of R >= 1 rows with at least one element each; it fixes shape and device of the others."""
    if isinstance(value, Tensor) and value.dim() >= 2 and value.numel() > 0 and value.dtype in FLOATS:
        return
    expect(isinstance(value, Tensor), name, type(value).__name__, "a tensor of shape (R, D...)")
    expect(value.dim() >= 2, name, f"shape {tuple(value.shape)}", "shape (R, D...) with at least one D")
    expect(value.numel() > 0, name, f"shape {tuple(value.shape)}", "at least one row and one element")
    expect(value.dtype in FLOATS, name, value.dtype, " or ".join(str(dtype) for dtype in FLOATS))


def check_like(first: Tensor, **others: Tensor | None) -> None:
    """Optional tensors with the shape and device of the first one."""
    for name, value in others.items():
        if value is not None:
            check_tensor(name, value, first.shape, first.device)


def check_coef(coef: object, first: Tensor) -> None:
    """(R, 3) fp32 (or float64 for the oracle)."""
    check_tensor("coef", coef, (first.shape[0], 3), first.device, PRECISE)


def check_std(coef: Tensor) -> None:
    """std >= 0 in (R, 3) coefficients: a check of values, for every call."""
    if coef.device.type != "cpu" or type(coef) not in PLAIN or torch.compiler.is_compiling():
        return
    for _, _, std in coef.tolist():
        if std < 0:
            raise ValueError(f"coef: found std {std}, expected std (column 2) >= 0")


def check_key(key: object, first: Tensor) -> None:
    """(R, 2) int64."""
    check_tensor("key", key, (first.shape[0], 2), first.device, (torch.int64,))


def check_count(name: str, value: object) -> None:
    """A positive integer."""
    is_count = isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
    expect(is_count and value >= 1, name, repr(value) if not is_count else value, "a positive int")


def check_guidance(guidance: float, velocity_uncond: Tensor | None) -> None:
    """A number, and 1 where there is no second velocity to guide with."""
    check_number("guidance", guidance)
    expect(velocity_uncond is not None or guidance == 1, "velocity_uncond", None, "a velocity where guidance is not 1")


def check_number(name: str, value: object) -> None:
    """A Python number: hyperparameters are compiled into the kernels, so a tensor would synchronise."""
    is_number = isinstance(value, (int, float, torch.SymFloat, torch.SymInt)) and not isinstance(value, bool)
    expect(is_number, name, type(value).__name__, "a Python number")


def check_noise_source(key: object, noise: object, siblings: object, first: Tensor) -> int:
    """Exactly one of `key` (with `siblings`) and `noise`; returns K."""
    expect((key is None) != (noise is None), "key, noise", _given(key, noise), "exactly one of the two")
    if noise is None:
        check_count("siblings", siblings)
        check_key(key, first)
        return siblings
    expect(isinstance(noise, Tensor), "noise", type(noise).__name__, "a tensor of shape (R, K, D...)")
    count = noise.shape[1] if noise.dim() > 1 else 0
    count = count if siblings is None else siblings
    check_tensor("noise", noise, (first.shape[0], count, *first.shape[1:]), first.device)
    return count


def _given(key: object, noise: object) -> str:
    return "neither" if key is None and noise is None else "both"
